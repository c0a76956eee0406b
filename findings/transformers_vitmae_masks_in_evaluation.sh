#!/usr/bin/env bash
# `AutoModel` of a `vit_mae` folder drops patches in evaluation, and with `mask_ratio=0` shuffles them.
#
# The guess: in evaluation a ViTMAEModel encodes the whole image, as a ViTModel does; or at least with mask_ratio 0
# it gives the tokens in the order of the patches.
# What happens: the random mask is drawn at every call, `eval()` or not: two calls on one image return a random
# quarter of its patches each. With `config.mask_ratio = 0` all patches are returned, still in a random
# order: token i of two calls belongs to two places; only the class token and the mean over patches
# agree. `pipeline("image-feature-extraction")` uses this class. A ViTModel with the same weights gives one answer.
#
# Seen with transformers 5.24.0, torch 2.14.1, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.24.0
cat > "$folder/look.py" <<'P'
import sys

import torch
from transformers import AutoModel, ViTMAEConfig

torch.manual_seed(0)
config = ViTMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                      image_size=64, patch_size=8)
model = AutoModel.from_config(config).eval()
torch.nn.init.normal_(model.embeddings.position_embeddings, std=0.5)
image = torch.randn(1, 3, 64, 64)
seen = []
for ratio in (0.75, 0.0):
    model.config.mask_ratio = ratio
    with torch.no_grad():
        one, two = (model(image).last_hidden_state for _ in range(2))
    first = (one[:, 0] - two[:, 0]).abs().max().item()
    tokens = (one[:, 1:] - two[:, 1:]).abs().max().item()
    mean = (one[:, 1:].mean(1) - two[:, 1:].mean(1)).abs().max().item()
    print(f"{type(model).__name__} in evaluation, mask_ratio {ratio}: {one.shape[1] - 1} of 64 patches; largest "
          f"difference of two calls {first:.1e} (class token), {tokens:.1e} (patches), {mean:.1e} (their mean)")
    seen.append((one.shape[1] - 1, first > 1e-3, tokens > 1e-3, mean > 1e-3))
sys.exit(seen != [(16, True, True, True), (64, False, True, False)])
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
