"""Reconstruction targets and their losses."""
