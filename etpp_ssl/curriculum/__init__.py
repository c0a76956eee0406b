"""How much of each image's spectrum is shown at every optimizer step."""
