#!/usr/bin/env bash
# Importing timm's optimizers raises torch.compile's limit of recompilations from 8 to 1,000,000, for the process.
#
# The guess: `torch._dynamo.config.recompile_limit` is 8 unless the program sets it; a function that meets a ninth
# shape or setting falls back to eager, with a warning.
# What happens: `timm.optim` brings its Kron optimizer, whose file sets `cache_size_limit`, an alias of the same
# setting, at import. So a training script compiles its ninth graph, or its hundredth, because it imports
# an optimizer, and falls back without that import: the same model file behaves differently in the script that
# trains it and in the one that serves it.
#
# Seen with timm 1.0.31, torch 2.14.1, torchvision 0.29.1, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/look.py" <<'P'
import subprocess
import sys

LOOK = """
import sys, torch, torch._dynamo
if sys.argv[1]: __import__(sys.argv[1])
graphs = 0
def count(graph, inputs):
    global graphs
    graphs += 1
    return graph
@torch.compile(backend=count, dynamic=False)
def double(x): return x * 2
for length in range(2, 14): double(torch.ones(length))
print(torch._dynamo.config.recompile_limit, graphs)
"""
seen = {}
for module in ("", "timm.models", "timm.optim"):
    done = subprocess.run([sys.executable, "-c", LOOK, module], capture_output=True, text=True, check=True)
    seen[module] = tuple(map(int, done.stdout.split()))
    print(f"after {f'import {module}' if module else 'no import'}: limit {seen[module][0]:,}, twelve lengths make "
          f"{seen[module][1]} graphs")
sys.exit(seen != {"": (8, 8), "timm.models": (8, 8), "timm.optim": (1_000_000, 12)})
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
