"""`etpp plan` as a process of its own: what it leaves out, and that the plan is the same without it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from etpp_ssl.commands.plan import KNOWN_TORCH

PLANNED = """
import json, sys
from etpp_ssl.commands.plan import ABSENT, _Absent, leave_out_compilers
if sys.argv[1] == "light":
    leave_out_compilers()
from etpp_ssl.recipe import load_any
from etpp_ssl.train.plan import plan_run
costs = {}
for name in sys.argv[2:]:
    plan = plan_run(load_any(name))
    costs[name] = [[s.cost.flops, s.cost.forward_flops, s.cost.saved_values, s.columns] for s in plan.stages]
left_out = [name for name in ABSENT if isinstance(sys.modules.get(name), _Absent)]
print(json.dumps([costs, left_out, "torch._dynamo.eval_frame" in sys.modules]))
"""
RECIPES = ["quickstart", "in1k_swin_tiny_etpp200"]
COMPILERS = ["torch._dynamo.eval_frame", "triton"]
HEAVY = [*COMPILERS, "matplotlib", "transformers", "datasets", "torch.distributed.tensor"]
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


@pytest.mark.skipif(not torch.__version__.startswith(KNOWN_TORCH), reason="imports of another torch")
def test_a_plan_without_compilers_is_the_same_plan() -> None:
    light, whole = (json.loads(run("-c", PLANNED, how, *RECIPES)) for how in ("light", "whole"))
    assert light[0] == whole[0]
    assert "torch._dynamo" in light[1]
    assert not light[2]
    assert whole[1:] == [[], True]


@pytest.mark.skipif(not torch.__version__.startswith(KNOWN_TORCH), reason="imports of another torch")
def test_the_command_imports_nothing_that_it_does_not_need() -> None:
    out = run("-c", COMMAND)
    *plan, modules = out.splitlines()
    assert any("speed-up" in line for line in plan)
    assert not [name for name in HEAVY if f"'{name}'" in modules]


def test_a_recipe_is_read_without_the_libraries_that_train() -> None:
    out = run("-c", "import sys, etpp_ssl.recipe; print(sorted(sys.modules))")
    heavy = [*HEAVY, "timm", "torchvision", "accelerate", "torch._dynamo"]
    assert not [name for name in heavy if f"'{name}'" in out]


def test_what_stands_in_for_a_module_gives_way_to_it() -> None:
    script = """
from etpp_ssl.commands.plan import leave_out_compilers
leave_out_compilers()
import sympy, torch._dynamo
assert torch._dynamo.disable(len) is len
assert sympy.sqrt(16) == 4
assert torch._dynamo.config.disable is False
assert "sympy" in repr(sympy.Integer(4).__class__)
"""
    run("-c", script)
