#!/usr/bin/env bash
# LoRA of peft on timm's BEiT: adapters of the fused qkv layer exist, are counted as trainable, and never learn.
#
# The guess: `target_modules=["qkv"]` adapts the attention of any timm transformer, as it does that of a ViT; where
# it cannot, peft raises.
# What happens: BEiT adds its bias to queries and values only, so its attention does not call the layer `qkv` but
# reads its weight. peft wraps the layer, hands the plain weight through, and reports the same number of
# trainable parameters as for the ViT; but the adapters take no part in the forward pass. Their gradient is None,
# and training changes nothing but the head, without a word.
#
# Seen with peft 0.21.2, timm 1.0.31, torch 2.14.1, torchvision 0.29.1, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 timm==1.0.31 peft==0.21.2
cat > "$folder/look.py" <<'P'
import sys

import timm
import torch
from peft import LoraConfig, get_peft_model

seen = {}
for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, depth=2)
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]))
    adapters = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert adapters and all(p.requires_grad for p in adapters.values())
    adapted(torch.randn(2, 3, 224, 224)).square().mean().backward()
    learning = sum(p.grad is not None for p in adapters.values())
    seen[name] = (len(adapters), learning)
    print(f"{name}: {len(adapters)} adapter tensors of the qkv layers, {learning} of them have a gradient")
sys.exit(seen != {"vit_tiny_patch16_224": (4, 4), "beit_base_patch16_224": (4, 0)})
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
