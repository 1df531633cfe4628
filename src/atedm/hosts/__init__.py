"""Hosts: each knows one family of models, and lets any method prune it."""
