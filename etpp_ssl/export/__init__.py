"""Run folders to weights that other libraries load."""
