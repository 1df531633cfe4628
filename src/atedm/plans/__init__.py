"""Plans: how a model spends its steps, its pruning and its cache, found for it by `atedm tune`, in a file."""
