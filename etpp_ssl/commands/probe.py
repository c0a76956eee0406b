"""Probing a run that is there already, or anybody's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from etpp_ssl.config import UserError
from etpp_ssl.data.views import Normalise
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.peers import Agreement, leave, with_peers
from etpp_ssl.dist.signals import Interrupted, StopRequest
from etpp_ssl.evaluation.base import ProbeStopped
from etpp_ssl.files import append_line, disk_fault
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.mae import build_probe
from etpp_ssl.weights.loading import load_init, load_trained


@with_peers()
def probe_run(recipe: Recipe, source: str, say: Callable[[str], None]) -> dict[str, float]:
    """Run the recipe's probe on a run's newest checkpoint, or on the weights that `init` names.

    The result is appended, with its protocol, to `report/probes.jsonl` in the run folder, or in the recipe's
    output folder where `source` is a recipe.

    Args:
        recipe: with a probe and whatever else was overridden; the run's own where `source` is a run.
        source: the run's folder, or the recipe's file: then the weights are those of `init`, or without it
            those of the run in the recipe's output folder.
        say: told what is probed, and how a long probe comes along.

    Returns:
        The probe's named numbers.

    Raises:
        UserError: if the recipe names no probe, the data does not serve it, there are no weights, or the
            model is another.
        Interrupted: after SIGTERM or SIGINT during a long probe, once its state is written.
    """
    if recipe.probe.name == "none":
        raise UserError("probe.name is none; choose one, for instance probe=knn")
    folder = RunFolder(source if os.path.isdir(source) else recipe.output)
    init = _init_of(recipe, source, folder)
    accelerator = open_accelerator(recipe)
    talk = say if accelerator.is_main_process else _silent
    model = freshly_initialised(recipe.seed, recipe.build_model)
    weights = _load_init(model, init, talk) if init is not None else _load_newest(model, folder, talk)
    model.to(accelerator.device)
    mean, std = recipe.data.statistics(recipe.in_chans)
    report = folder.path / "report"
    probe = build_probe(
        recipe,
        accelerator,
        Normalise(mean, std, accelerator.device),
        recipe.build_objective(),
        folder=report,
        stop_signal=lambda: _noted_signal(accelerator),
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
    """Append a result; a disk that does not take it costs no result, which is printed in any case."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_line(file, json.dumps(row))
    except OSError as error:
        say(f"warning: {str(file)!r} cannot be written: {disk_fault(error)}; the result is printed only")


def _init_of(recipe: Recipe, source: str, folder: RunFolder) -> str | None:
    """What to load, or None for the newest checkpoint in the folder."""
    if not os.path.isdir(source):
        if recipe.init is None and not folder.exists():
            raise UserError(
                f"there are no weights to probe: init is null, and {recipe.output!r} is no run folder; give "
                f"init=FILE-or-RUN, or the folder of a run instead of a recipe"
            )
        return recipe.init
    if recipe.init != folder.recipe().init:
        raise UserError(
            f"init is {recipe.init!r}, but of a run its own checkpoint is probed; other weights are probed "
            f"with a recipe: etpp probe RECIPE init={recipe.init}"
        )
    return None


def _load_newest(model: MaskedAutoencoder, folder: RunFolder, say: Callable[[str], None]) -> dict[str, Any]:
    checkpoint = folder.trained(say)
    load_trained(model, checkpoint)
    return {"step": checkpoint.step}


def _load_init(model: MaskedAutoencoder, init: str, say: Callable[[str], None]) -> dict[str, Any]:
    load_init(model, init, say)
    return {"init": init}


@contextmanager
def _noted_signal(accelerator: Accelerator) -> Iterator[Callable[[], int]]:
    agreement = Agreement(accelerator)
    with StopRequest() as request:
        yield lambda: agreement.reach(request.signum, False)[0]


def _silent(text: str) -> None:
    """The other processes."""
