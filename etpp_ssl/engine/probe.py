"""Probing a run that is there already."""

from __future__ import annotations

import json
from collections.abc import Callable

from etpp_ssl.config import UserError
from etpp_ssl.data.augment import Normalise
from etpp_ssl.engine.run import build_probe, open_accelerator
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder, load_weights


def probe_run(recipe: Recipe, folder: RunFolder, say: Callable[[str], None]) -> dict[str, float]:
    """Run the recipe's probe on a run's newest checkpoint.

    The result is appended, with its protocol, to `report/probes.jsonl` in the run folder.

    Args:
        recipe: the run's own, with a probe and whatever else was overridden.
        folder: the run.
        say: told of damaged checkpoints.

    Returns:
        The probe's named numbers.

    Raises:
        UserError: if the recipe names no probe, the data does not serve it, or the model is another.
    """
    if recipe.probe.name == "none":
        raise UserError("probe.name is none; choose one, for instance probe=knn")
    checkpoint = folder.trained(say)
    accelerator = open_accelerator(recipe)
    model = recipe.build_model()
    weights = load_weights(model.state_dict(), checkpoint.model(), f"checkpoint {checkpoint.path}")
    model.load_state_dict(weights)
    model.to(accelerator.device)
    mean, std = recipe.data.statistics(recipe.in_chans)
    normalise = Normalise(mean, std, accelerator.device)
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
    assert probe is not None
    numbers = probe.run(model)
    if accelerator.is_main_process:
        row = {"step": checkpoint.step, "protocol": recipe.probe.model_dump(), **numbers}
        report = folder.path / "report"
        report.mkdir(exist_ok=True)
        with (report / "probes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return numbers
