"""What is compared: dense, pruning in any setting, ToMe, DeepCache, and stacks of them."""
