"""What is special about masked autoencoding and about classification."""
