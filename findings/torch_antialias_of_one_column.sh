#!/usr/bin/env bash
# The guess: torch.nn.functional.interpolate(..., antialias=True) resizes the rows of an image that is one
# pixel wide like those of any other image; `size` and the number of channels do not matter.
#
# What really happens (torch 2.14.1 on the CPU, float32 and float64, bilinear and bicubic): where the width is
# 1, or becomes 1 in the same call, every output row is the first one. The same values as two equal columns
# come out right, and so does one column in channels_last memory of 2 channels or more. There is no warning.
# Images one pixel wide are rare; profiles, scan lines and averages over an axis are not.
#
# Seen on 2026-11-30 with torch 2.14.1 and numpy 2.4.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.14.1" "numpy==2.4.6"
"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.functional import interpolate

wrong = []
for mode in ("bilinear", "bicubic"):
    column = torch.arange(6.0).view(1, 1, 6, 1)
    for what, image, size in (
        ("one column", column, (3, 1)),
        ("two columns to one", column.expand(-1, -1, -1, 2).contiguous(), (3, 1)),
        ("two columns to two", column.expand(-1, -1, -1, 2).contiguous(), (3, 2)),
    ):
        rows = interpolate(image, size=size, mode=mode, antialias=True)[0, 0, :, 0]
        print(f"{mode}, {what}: {[round(value, 3) for value in rows.tolist()]}")
        if rows.max() - rows.min() < 1:
            wrong.append((mode, what))
assert wrong == [
    (mode, what) for mode in ("bilinear", "bicubic") for what in ("one column", "two columns to one")
], f"this has changed: {wrong}"
PYTHON
