"""What models cost, dense and pruned, in multiply-accumulates (MACs), without weights."""
