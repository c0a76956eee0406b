#!/usr/bin/env bash
# `tifffile.imwrite` stores an (H, W, 3) or (H, W, 4) array as one image, and (H, W, 5) as H images of (W, 5).
#
# The guess: the last axis of a 3-D array is the samples of a pixel, however many there are, or imwrite asks.
# What happens: without `photometric` and `planarconfig` only 3 and 4 are taken for samples (RGB, RGB and alpha);
# 2 or 5 and more are taken for a stack of pages, one per row of the picture, without a word. Readers that
# take the first page get one row of pixels. `photometric="minisblack", planarconfig="contig"` stores one
# image of 5 samples.
#
# Seen with tifffile 2026.3.3, numpy 2, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  tifffile==2026.3.3 'numpy>=2'
cat > "$folder/look.py" <<'P'
import sys

import numpy as np
import tifffile

H, W = 64, 96
seen = {}
for channels in (2, 3, 4, 5, 13):
    tifffile.imwrite("stack.tif", np.zeros((H, W, channels), np.uint8))
    with tifffile.TiffFile("stack.tif") as file:
        seen[channels] = (len(file.pages), file.pages[0].shape)
    print(f"({H}, {W}, {channels}): {seen[channels][0]} pages, the first of shape {seen[channels][1]}")
tifffile.imwrite("said.tif", np.zeros((H, W, 5), np.uint8), photometric="minisblack", planarconfig="contig")
with tifffile.TiffFile("said.tif") as file:
    said = (len(file.pages), file.pages[0].shape)
print(f"({H}, {W}, 5), photometric and planarconfig said: {said[0]} page of shape {said[1]}")
rows = {channels: (H, (W, channels)) for channels in (2, 5, 13)}
whole = {channels: (1, (H, W, channels)) for channels in (3, 4)}
sys.exit(seen != rows | whole or said != (1, (H, W, 5)))
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
