#!/usr/bin/env bash
# Pillow turns a WhiteIsZero TIFF into a positive at 8 bits and leaves it a negative at 16.
#
# The guess: whatever Pillow does about PhotometricInterpretation 0 (films, gels, scans), it does at every depth.
# What happens: 8-bit files come back inverted (255 - value, mode L), so that white is 255; 16-bit files come back
# as stored (mode I;16), so that white is 0. A folder of both holds negatives among positives. tifffile inverts
# neither.
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

stored = np.arange(35 * 21).reshape(35, 21) % 200
seen = {}
for dtype in (np.uint8, np.uint16):
    tifffile.imwrite("film.tif", stored.astype(dtype), photometric="miniswhite")
    with Image.open("film.tif") as image:
        pixels = np.asarray(image).astype(int)
        print(f"{dtype.__name__}: stored {stored[0, :4].tolist()}, Pillow {pixels[0, :4].tolist()} ({image.mode}), "
              f"tifffile {tifffile.imread('film.tif')[0, :4].tolist()}")
    seen[dtype.__name__] = (bool((pixels == 255 - stored).all()), bool((pixels == stored).all()))
sys.exit(seen != {"uint8": (True, False), "uint16": (False, True)})
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
