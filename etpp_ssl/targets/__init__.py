"""What a masked autoencoder reconstructs, and the losses."""
