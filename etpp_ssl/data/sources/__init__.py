"""Which files: data sets that are addressed by index."""
