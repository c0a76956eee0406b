"""`etpp plan`: print what a recipe would cost.

The process plans and ends, so compilers, whose import takes longer than the plan, are left out of it.
"""

from __future__ import annotations

import importlib
import operator
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rich.console import Console


def show_plan(recipe: str, overrides: Sequence[str], console: Console, *, alone: bool = False) -> None:
    """Print stages, learning rate, memory and cost of a recipe or a run folder.

    Args:
        recipe: path or name.
        overrides: `section.key=value` each.
        console: to print to.
        alone: whether nothing else will run in this process.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    from etpp_ssl.recipe import load_any
    from etpp_ssl.run_folder import RunFolder

    chosen = load_any(recipe, overrides)
    if alone and not getattr(chosen.model, "compiled", False):
        leave_out_compilers()
    from etpp_ssl.train.plan import plan_run, print_plan

    folder = RunFolder(recipe) if os.path.isdir(recipe) else None
    print_plan(plan_run(chosen, folder), console)


def leave_out_compilers() -> None:
    """Let torch's compiler and what belongs to it be imported only for more than `ABSENT` has of them.

    timm, torchvision and torch's meta kernels import `torch._dynamo` to exempt functions of theirs from
    compilation: where nothing is compiled, a function is exempt as it is. Meta kernels ask whether sizes are
    symbols (with sympy behind): they are numbers here. torch's counts of operations know triton's kernels.
    """
    import torch

    if torch.__version__.startswith(KNOWN_TORCH) and not sys.modules.keys() & ABSENT.keys():
        sys.modules.update({name: _Absent(name, **names) for name, names in ABSENT.items()})


class _Absent(ModuleType):
    """Has some of a module's names; the first other one that is asked for brings the module itself."""

    def __init__(self, name: str, **names: Any) -> None:
        super().__init__(name)
        # Imports look for the path each time, and meta kernels import in their bodies.
        self.__dict__.update(names, __path__=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        for absent in ABSENT:
            if self.__name__.startswith(absent) or absent.startswith(self.__name__):
                sys.modules.pop(absent, None)
        return getattr(importlib.import_module(self.__name__), name)


class _Nothing:
    """A class that nothing is of."""


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    return _as_it_is if function is None else function


def _not_supported(device: str) -> bool:
    return False


KNOWN_TORCH = "2.14."
"""The version whose imports `ABSENT` knows; with another one everything is imported."""
ABSENT: dict[str, dict[str, Any]] = {
    "torch._dynamo": {"disable": _as_it_is},
    "torch._dynamo.utils": {"is_compile_supported": _not_supported},
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
        "free_unbacked_symbols": lambda *sizes: set(),
        "guarding_hint_or_throw": _as_it_is,
        "has_guarding_hint": lambda size: True,
        "is_nested_int": lambda size: False,
        "statically_known_true": bool,
        "sym_and": lambda *conditions: all(conditions),
        "sym_eq": operator.eq,
        "sym_or": lambda *conditions: any(conditions),
    },
    "sympy": {"Basic": _Nothing},
    "triton.runtime.jit": {"JITFunction": _Nothing},
}
"""Modules that a plan does without, and what stands in for the names that it needs of them."""
