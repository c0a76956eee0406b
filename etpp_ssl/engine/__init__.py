"""Runs: the pre-training loop, its state, its checkpoints and its log."""
