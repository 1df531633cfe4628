"""Probes that look into a model or a method: latency, memory, variance, errors, objects, agreement, scaling."""
