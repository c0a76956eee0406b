#!/usr/bin/env bash
# transformers: the names of a ViT's tensors in memory are not those that it writes to a file.
#
# The guess: `model.state_dict()` has the keys of the safetensors file that `model.save_pretrained()` writes, so a
# converter that knows the one knows the other, and `load_state_dict` takes the file.
# What happens, in version 5: ViTModel, Dinov2Model and DINOv3ViTModel rename tensors while they save and load
# (`attention.q_proj` in memory is `attention.attention.query` in the file of a ViT or a DINOv2; a DINOv3's
# blocks begin with `model.` in memory only). CLIP's and SigLIP's vision models have one set of names. The files
# are those of version 4; `load_state_dict` of one fails, and weights that somebody saved with `torch.save` have
# the other names, though both are "a transformers checkpoint".
#
# Seen with transformers 5.24.0, torch 2.14.1, safetensors of that day, Python 3.11, Linux, on 2026-12-01.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 transformers==5.24.0
cat > "$folder/look.py" <<'P'
import sys
import tempfile
from pathlib import Path

import transformers
from safetensors.torch import load_file

sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48,
         "image_size": 32, "patch_size": 8}
seen = {}
for name in ("ViT", "Dinov2", "DINOv3ViT", "CLIPVision", "SiglipVision"):
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(Path(folder) / "model.safetensors")
    own = model.state_dict()
    try:
        model.load_state_dict(stored)
        taken = True
    except RuntimeError:
        taken = False
    example = next((f"{a} / {b}" for a, b in zip(sorted(own.keys() - stored), sorted(stored.keys() - own))), "")
    seen[name] = (len(own.keys() - stored.keys()), taken)
    print(f"{name}Model: {len(own)} tensors, {seen[name][0]} of other names in the file, "
          f"load_state_dict of the file {'works' if taken else 'fails'}; {example}")
sys.exit({name for name, found in seen.items() if found[0] and not found[1]} != {"ViT", "Dinov2", "DINOv3ViT"}
         or any(found != (0, True) for name, found in seen.items() if name in ("CLIPVision", "SiglipVision")))
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py" 2> /dev/null
