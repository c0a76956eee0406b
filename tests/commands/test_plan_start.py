"""`etpp plan` as a process of its own: what reading a recipe and the whole command do not import."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ["matplotlib", "transformers", "datasets"]
HEAVY_FOR_RECIPES = [*HEAVY, "timm", "torchvision", "accelerate", "torch._dynamo"]
COMMAND = """
import os, sys
import etpp_ssl.recipe
print(sorted(sys.modules))
# The last thing that the process does is to tell what it has imported.
leave = os._exit
os._exit = lambda code: (print(sorted(sys.modules), flush=True), leave(code))
sys.argv = ["etpp", "plan", "quickstart"]
from etpp_ssl.cli import main
main()
"""


def test_a_recipe_and_a_plan_import_nothing_that_they_do_not_need() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for_recipe, *plan, for_plan = done.stdout.splitlines()
    assert any("speed-up" in line for line in plan)
    assert "'torch'" in for_recipe
    assert not [name for name in HEAVY_FOR_RECIPES if f"'{name}'" in for_recipe]
    assert not [name for name in HEAVY if f"'{name}'" in for_plan]
