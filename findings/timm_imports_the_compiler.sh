#!/usr/bin/env bash
# `import timm` loads torch's compiler, although nothing is compiled.
#
# The guess: timm takes `create_feature_extractor` from torchvision, so it loads torchvision's models; torch's
# compiler is loaded when somebody calls `torch.compile`.
# What happens: torchvision.models brings torchvision.ops, whose roi_align asks torch._dynamo.utils, while it
# is imported, whether a device can be compiled for. That loads all of torch._dynamo, with sympy behind it.
# `import torch` alone loads neither. In a process that only builds a model and counts its parameters, these
# imports take more CPU time than `import torch` leaves for everything else.
#
# Seen with torch 2.14.1, torchvision 0.29.1, timm 1.0.31, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cat > "$folder/look.py" <<'P'
import resource
import subprocess
import sys

LOOK = """
import importlib, resource, sys
importlib.import_module(sys.argv[1])
print(*("torch._dynamo" in sys.modules, "sympy" in sys.modules))
"""


def seen(module):
    """(whether torch._dynamo was loaded, whether sympy was, CPU seconds) of one import in a new process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", LOOK, module], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    dynamo, sympy = (word == "True" for word in done.stdout.split())
    return dynamo, sympy, spent


found = {}
for module in ("torch", "torchvision.ops", "timm"):
    seen(module)  # Once for the compiled files of Python.
    dynamo, sympy, spent = seen(module)
    found[module] = (dynamo, sympy)
    print(f"import {module}: {spent:.1f} CPU s, torch._dynamo {'loaded' if dynamo else 'not loaded'}, "
          f"sympy {'loaded' if sympy else 'not loaded'}")
expected = {"torch": (False, False), "torchvision.ops": (True, True), "timm": (True, True)}
sys.exit(found != expected)
P
"$folder/venv/bin/python" "$folder/look.py"
