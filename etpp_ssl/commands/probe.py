"""`etpp probe`: what an encoder has learnt, a run's or one of other weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from etpp_ssl.commands.trained import trained_model, untrained_model
from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.dist.accelerator import StopRequest, open_accelerator, process_as_found
from etpp_ssl.dist.peers import Agreement, leave, with_peers
from etpp_ssl.evaluation.measured_on import (
    in_words,
    measured_on,
    shown_number,
    training_mark,
    without_looking,
)
from etpp_ssl.files import append_line, check_place, disk_fault
from etpp_ssl.recipe import ProbedClassifier, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.mae import build_probe


@process_as_found()
@with_peers()
def probe_run(
    recipe: Recipe | ProbedClassifier, source: str, say: Callable[[str], None], *, untrained: bool = False
) -> dict[str, float]:
    """Run the recipe's probe on a run's newest checkpoint, or on the weights that `init` names.

    The result is printed, and then appended, with its protocol and a record of its images, to
    `report/probes.jsonl` in the run folder, or in the recipe's output folder where `source` is a recipe.

    Args:
        recipe: with a probe and other overrides; the run's own where `source` is a run, of any task.
        source: the run's folder or a recipe's file. With a recipe, the weights are those of `init`, or where
            that is null those of the run in the recipe's output folder.
        say: told what is probed, and about the progress of a long probe.
        untrained: whether the encoder is probed with the recipe's initial weights, too.

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
    from_init = _takes_init(recipe, source, folder)
    accelerator = open_accelerator(recipe)
    talk = say if accelerator.is_main_process else lambda _: None
    report = folder.path / "report"
    file = folder.probes_file
    fault = Agreement(accelerator).main_says(_fault_of(file) if accelerator.is_main_process else "")
    if fault:
        talk(f"warning: {fault}; the result is printed only, and an interrupted probe starts again")
    trained = trained_model(recipe, None if from_init else folder, talk)
    probe = build_probe(
        recipe,
        accelerator,
        recipe.normaliser(accelerator.device),
        recipe.build_objective() if isinstance(recipe, Recipe) else None,
        folder=None if fault else report,
        stop_signal=lambda: _recorded_signal(accelerator),
        say=talk,
    )
    assert probe is not None
    try:
        numbers = probe.run(trained.model.to(accelerator.device))
        reference = {}
        if untrained:
            classes = trained.classes or recipe.open_split("train").classes
            initial = untrained_model(recipe, classes).to(accelerator.device)
            reference = {f"untrained_{name}": value for name, value in probe.run(initial).items()}
    except Interrupted:
        leave(accelerator)
        raise
    if accelerator.is_main_process:
        data = measured_on(recipe, "eval", probe.evaluation, [*trained.trainings, (recipe, None)])
        _print(recipe, numbers, reference, data, without_looking(probe.evaluation))
        row = {**trained.weights, "protocol": recipe.probe.model_dump(), "data": data, **numbers}
        if reference:
            row["untrained"] = reference
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            append_line(file, json.dumps(row))
        except OSError as error:
            talk(f"warning: {str(file)!r} cannot be written: {disk_fault(error)}; the result is printed only")
    leave(accelerator)
    return numbers


def _fault_of(file: Path) -> str:
    """Why a file cannot be written, or nothing."""
    try:
        check_place(file)
    except UserError as error:
        return str(error)
    return ""


def _print(
    recipe: Recipe | ProbedClassifier,
    numbers: dict[str, float],
    reference: dict[str, float],
    data: dict[str, Any],
    without_looking: str,
) -> None:
    """The protocol and the images in a line each, then the values."""
    # When a run probes says nothing of this probe.
    protocol = recipe.probe.model_dump(exclude={"every_steps"}, exclude_none=True)
    print("probe: " + " ".join(f"{key}={value}" for key, value in protocol.items()))
    accuracy = any(name.endswith("top1") for name in numbers)
    beside = f"; {without_looking}" if accuracy and without_looking else ""
    print(f"images: {in_words(data)}{beside}")
    mark = training_mark(data)
    for name, value in numbers.items():
        print(f"{name} {shown_number(name, value, 6)}" + (f" ({mark})" if mark else ""), flush=True)
    for name, value in reference.items():
        print(f"{name} {shown_number(name, value, 6)}", flush=True)


def _takes_init(recipe: Recipe | ProbedClassifier, source: str, folder: RunFolder) -> bool:
    """Whether the weights are those that `init` names, not those of the newest checkpoint in the folder."""
    if not os.path.isdir(source):
        if recipe.init is None and not folder.exists():
            raise UserError(
                f"there are no weights to probe: init is null, and {recipe.output!r} is not a run folder; "
                f"give init=FILE-or-RUN, or the folder of a run instead of a recipe"
            )
        return recipe.init is not None
    if recipe.init != folder.any_recipe().init:
        raise UserError(
            f"init is {recipe.init!r}, but for a run its own checkpoint is probed; to probe other weights, "
            f"give a recipe: etpp probe RECIPE init={recipe.init}"
        )
    return False


@contextmanager
def _recorded_signal(accelerator: Accelerator) -> Iterator[Callable[[], int]]:
    agreement = Agreement(accelerator)
    with StopRequest() as request:
        yield lambda: agreement.reach(request.signum, False)[0]
