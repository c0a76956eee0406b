"""Masked autoencoder around an unmodified timm Vision Transformer."""
