"""`evaluate.repeats`: a classifier's run again with other seeds, and the mean and spread of its results.

With few labels one draw of them says little: each seed draws other images (`data.label_share`,
`data.labels_per_class`), another holdout, and another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.measured_on import shown_number
from etpp_ssl.files import write_text
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.train.launch import finetune

SHOWN = ("top1", "macro_top1", "eval_loss", "start_holdout_top1", "holdout_top1")


def finetune_repeatedly(recipe: FinetuneRecipe) -> dict[str, Any]:
    """Run a recipe with as many seeds as `evaluate.repeats` says, the recipe's own first.

    Each is an ordinary run, in `seed-N` of the recipe's output folder; the same command resumes. The summary
    is written to `repeats.json` there.

    Returns:
        `seeds`, each with its numbers, and `mean` and `deviation` (of the sample, divided by n - 1) by name.

    Raises:
        UserError: if the recipe evaluates nothing, and for whatever keeps a run from its end.
    """
    if recipe.evaluate.split is None:
        raise UserError("evaluate.repeats compares evaluations, and evaluate.split is null")
    once = recipe.evaluate.model_copy(update={"repeats": 1})
    found = {}
    for seed in range(recipe.seed, recipe.seed + recipe.evaluate.repeats):
        output = str(Path(recipe.output) / f"seed-{seed}")
        run = finetune(recipe.model_copy(update={"seed": seed, "output": output, "evaluate": once}))
        numbers: dict[str, Any] = {}
        for row in run.folder.metrics():
            if row["step"] == run.state.step:
                numbers |= {key: row[key] for key in SHOWN if key in row}
        found[seed] = numbers
    names = list(found[recipe.seed])
    columns = {name: [numbers[name] for numbers in found.values()] for name in names}
    summary = {
        "seeds": found,
        "mean": {name: fmean(values) for name, values in columns.items()},
        "deviation": {name: stdev(values) for name, values in columns.items()},
    }
    if run.accelerator.is_main_process:
        write_text(Path(recipe.output) / "repeats.json", json.dumps(summary, indent=1) + "\n")
    return summary


def print_repeats(summary: dict[str, Any], console: Console) -> None:
    """A row for each seed, then mean and deviation."""
    table = Table("seed", *summary["mean"], box=None)
    rows = {**summary["seeds"], "mean": summary["mean"], "deviation": summary["deviation"]}
    for title, numbers in rows.items():
        table.add_row(str(title), *(shown_number(name, value) for name, value in numbers.items()))
    console.print(table)
