"""`etpp probe`: what an encoder has learnt, a run's or one of other weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from etpp_ssl.config import UserError
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.dist.peers import Agreement, leave, with_peers
from etpp_ssl.dist.signals import Interrupted, StopRequest
from etpp_ssl.evaluation.base import ProbeStopped
from etpp_ssl.files import append_line, disk_fault
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.mae import build_probe
from etpp_ssl.weights.loading import load_init, load_trained


@process_as_found()
@with_peers()
def probe_run(recipe: Recipe, source: str, say: Callable[[str], None]) -> dict[str, float]:
    """Run the recipe's probe on a run's newest checkpoint, or on the weights that `init` names.

    The result is appended, with its protocol, to `report/probes.jsonl` in the run folder, or in the recipe's
    output folder where `source` is a recipe.

    Args:
        recipe: with a probe and other overrides; the run's own where `source` is a run.
        source: the run's folder or a recipe's file. With a recipe, the weights are those of `init`, or where
            that is null those of the run in the recipe's output folder.
        say: told what is probed, and about the progress of a long probe.

    Returns:
        The probe's named numbers.

    Raises:
        UserError: if the recipe names no probe, the data has no labels that the probe needs, there are no
            weights, or they do not fit the recipe's model.
        Interrupted: after SIGTERM or SIGINT during a long probe, once its state is written.
    """
    if recipe.probe.name == "none":
        raise UserError("probe.name is none; choose one, for instance probe=knn")
    folder = RunFolder(source if os.path.isdir(source) else recipe.output)
    init = _init_of(recipe, source, folder)
    accelerator = open_accelerator(recipe)
    talk = say if accelerator.is_main_process else _silent
    model = freshly_initialised(recipe.seed, recipe.build_model)
    weights: dict[str, Any]
    if init is not None:
        load_init(model, init, talk)
        weights = {"init": init}
    else:
        checkpoint = folder.trained(talk)
        load_trained(model, checkpoint)
        weights = {"step": checkpoint.step}
    model.to(accelerator.device)
    report = folder.path / "report"
    probe = build_probe(
        recipe,
        accelerator,
        recipe.normaliser(accelerator.device),
        recipe.build_objective(),
        folder=report,
        stop_signal=lambda: _recorded_signal(accelerator),
        say=talk,
    )
    assert probe is not None
    try:
        numbers = probe.run(model)
    except ProbeStopped as stopped:
        leave(accelerator)
        raise Interrupted(stopped.signum, stopped.step) from None
    if accelerator.is_main_process:
        _record(report / "probes.jsonl", {**weights, "protocol": recipe.probe.model_dump(), **numbers}, talk)
    leave(accelerator)
    return numbers


def _record(file: Path, row: dict[str, Any], say: Callable[[str], None]) -> None:
    """Append a result. One that cannot be written is not lost, since it is printed in any case."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_line(file, json.dumps(row))
    except OSError as error:
        say(f"warning: {str(file)!r} cannot be written: {disk_fault(error)}; the result is printed only")


def _init_of(recipe: Recipe, source: str, folder: RunFolder) -> str | None:
    """Weights to load, or None for the newest checkpoint in the folder."""
    if not os.path.isdir(source):
        if recipe.init is None and not folder.exists():
            raise UserError(
                f"there are no weights to probe: init is null, and {recipe.output!r} is not a run folder; "
                f"give init=FILE-or-RUN, or the folder of a run instead of a recipe"
            )
        return recipe.init
    if recipe.init != folder.recipe().init:
        raise UserError(
            f"init is {recipe.init!r}, but for a run its own checkpoint is probed; to probe other weights, "
            f"give a recipe: etpp probe RECIPE init={recipe.init}"
        )
    return None


@contextmanager
def _recorded_signal(accelerator: Accelerator) -> Iterator[Callable[[], int]]:
    agreement = Agreement(accelerator)
    with StopRequest() as request:
        yield lambda: agreement.reach(request.signum, False)[0]


def _silent(text: str) -> None:
    """Drop a message, on all processes but the main one."""
