#!/usr/bin/env bash
# An uncompressed uint16 RGB TIFF with separate planes opens in Pillow with wrong pixels, without an error.
#
# The guess: Pillow reads 16-bit RGB TIFFs at 8 bits, by their high bytes (so it does for interleaved ones); a
# layout that it does not know ends in UnidentifiedImageError.
# What happens: for PlanarConfiguration 2 without compression the bytes of each plane are taken as its pixels, so
# the low and the high byte of a value are two neighbours in a row, and only the left half of every row is
# shown. `tifffile.imwrite` makes this layout of a (3, H, W) array, GDAL of INTERLEAVE=BAND. tifffile reads it right.
#
# Seen with pillow 13.0.0, tifffile 2026.3.3, numpy 2, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  pillow==13.0.0 tifffile==2026.3.3 'numpy>=2'
cat > "$folder/look.py" <<'P'
import sys

import numpy as np
import tifffile
from PIL import Image

C, H, W = 3, 40, 56
values = np.random.default_rng(0).integers(0, 4000, (C, H, W)).astype("<u2")
tifffile.imwrite("planar.tif", values, photometric="rgb", planarconfig="separate")
tifffile.imwrite("interleaved.tif", values.transpose(1, 2, 0), photometric="rgb")

high = (values >> 8).astype(np.uint8).transpose(1, 2, 0)
as_bytes = values.view(np.uint8).reshape(C, -1)[:, : H * W].reshape(C, H, W).transpose(1, 2, 0)
seen = {}
for name in ("interleaved", "planar"):
    with Image.open(f"{name}.tif") as image:
        pixels = np.asarray(image)
        print(f"{name}: mode {image.mode}, first values of the first channel {pixels[0, :6, 0].tolist()}")
    seen[name] = (bool((pixels == high).all()), bool((pixels == as_bytes).all()))
print(f"high bytes of what was written: {high[0, :6, 0].tolist()}; its bytes: {as_bytes[0, :6, 0].tolist()}")
print(f"tifffile reads the planar file right: {np.array_equal(tifffile.imread('planar.tif'), values)}")
sys.exit(seen != {"interleaved": (True, False), "planar": (False, True)})
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
