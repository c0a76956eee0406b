"""Masked autoencoder pre-training with the EfficientTrain++ frequency-cropping curriculum."""

__version__ = "0.5.1"
