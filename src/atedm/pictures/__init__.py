"""Sheets to look at: dense beside pruned, and what was kept where."""
