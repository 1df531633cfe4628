"""A web page that shows pruning: dense beside pruned, what was kept, and what it cost."""
