"""Is it learning? Frozen features, kNN, held-out reconstruction."""
