"""`etpp plan` as a process of its own, and reading a recipe: what they do not import."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["matplotlib", "transformers", "datasets"]
COMMAND = """
import os, sys
# The last thing that the process does is to tell what it has imported.
leave = os._exit
os._exit = lambda code: (print(sorted(sys.modules), flush=True), leave(code))
sys.argv = ["etpp", "plan", "quickstart"]
from etpp_ssl.cli import main
main()
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_imports_nothing_that_it_does_not_need() -> None:
    out = run("-c", COMMAND)
    *plan, modules = out.splitlines()
    assert any("speed-up" in line for line in plan)
    assert not [name for name in HEAVY if f"'{name}'" in modules]


def test_a_recipe_is_read_without_the_libraries_that_train() -> None:
    out = run("-c", "import sys, etpp_ssl.recipe; print(sorted(sys.modules))")
    heavy = [*HEAVY, "timm", "torchvision", "accelerate", "torch._dynamo"]
    assert not [name for name in heavy if f"'{name}'" in out]
