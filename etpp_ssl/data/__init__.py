"""From files to keyed batches of uint8 images."""
