"""Data sets that are read in sequence."""
