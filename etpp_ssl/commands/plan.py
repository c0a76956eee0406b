"""`etpp plan`: print what a recipe would cost."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console


def show_plan(recipe: str, overrides: Sequence[str], console: Console) -> None:
    """Print stages, learning rate, memory and cost of a recipe or a run folder.

    Args:
        recipe: path or name.
        overrides: `section.key=value` each.
        console: to print to.

    Raises:
        UserError: for anything that would keep the run from starting, as far as it shows without data.
    """
    from etpp_ssl.recipe import load_any
    from etpp_ssl.run_folder import RunFolder
    from etpp_ssl.train.plan import plan_run, print_plan

    chosen = load_any(recipe, overrides)
    folder = RunFolder(recipe) if os.path.isdir(recipe) else None
    print_plan(plan_run(chosen, folder), console)
