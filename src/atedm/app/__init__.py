"""What the package does for people: open a model, make images dense and pruned, and draw what was pruned."""
