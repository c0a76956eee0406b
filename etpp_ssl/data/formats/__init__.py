"""What an image file holds: one file per format."""
