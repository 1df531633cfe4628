"""Measuring what pruning costs in quality."""
