"""A page to see pruning in: dense beside pruned, what was kept, and what it cost."""
