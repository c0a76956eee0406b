"""What `tools/gpu_check.py` checks and measures, one file per subject."""
