"""Evaluation of encoders and classifiers: probes on frozen features, held-out losses, accuracies."""
