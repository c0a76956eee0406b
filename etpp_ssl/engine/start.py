"""Where a run starts: new, resumed or forked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from etpp_ssl.config import UserError
from etpp_ssl.data.images import ImageSource
from etpp_ssl.engine.metrics import MetricsFile
from etpp_ssl.engine.state import TrainState
from etpp_ssl.recipe import Recipe, changed_keys
from etpp_ssl.run_folder import Checkpoint, RunFolder


def starting_point(
    recipe: Recipe,
    folder: RunFolder,
    source: ImageSource,
    fork: Path | None,
    say: Callable[[str], None],
) -> tuple[Checkpoint | None, TrainState]:
    """The checkpoint to start from, or None, and the state to start with.

    Args:
        recipe: the run.
        folder: its folder, which may hold an earlier part of it.
        source: the training images.
        fork: another run folder to start from where `folder` has no checkpoint.
        say: told of damaged checkpoints and of what was chosen.

    Raises:
        UserError: if the folder's run has another recipe, other data or no readable checkpoint.
    """
    start = None
    if folder.exists():
        changed = changed_keys(folder.recipe(), recipe)
        if changed:
            raise UserError(
                f"run {str(folder.path)!r} was started with other settings: {'; '.join(changed)}; go on "
                f"with the old ones, or use --fork {folder.path} with another output"
            )
        start = folder.newest(say)
    elif folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(
            f"output {str(folder.path)!r} is a folder with other files in it and no run; choose another"
        )
    forked = start is None and fork is not None
    if forked:
        assert fork is not None
        start = RunFolder(fork).trained(say)
    if start is None:
        return None, TrainState()
    saved = start.state()
    if saved["data"] != source.fingerprint() and not forked:
        raise UserError(
            f"the data is not what run {str(folder.path)!r} was started with: files were added, removed or "
            f"renamed; use --fork {folder.path} with another output to go on with these"
        )
    state = TrainState.from_json(saved["state"])
    if forked:
        # The old recipe's losses belong in no row of this one's.
        state.loss_sum, state.part_sums, state.loss_steps = 0.0, {}, 0
        say(f"forked from {start.path} at step {state.step}")
    else:
        say(f"resuming {folder.path} at step {state.step}")
    return start, state


def prepare_folder(
    folder: RunFolder, recipe: Recipe, step: int, num_parameters: int, metrics: MetricsFile
) -> None:
    """Create a run's folder, or bring it back to a checkpoint's step; the main process only.

    Args:
        folder: the run's folder.
        recipe: what to record there.
        step: optimizer steps done; later checkpoints and rows are of a past that did not happen.
        num_parameters: of the model, to see whether its checkpoints fit the disk.
        metrics: the folder's log.

    Raises:
        UserError: if the disk is too full or the folder cannot be written to.
    """
    path = folder.path.absolute()
    existing = next(p for p in [path, *path.parents] if p.exists())
    try:
        # Weights and two moments in float32, one checkpoint more while it is written.
        need = 12 * num_parameters * (recipe.checkpoint.keep + 1)
        disk = shutil.disk_usage(existing)
        if disk.total and disk.free < need:
            raise UserError(
                f"output {str(folder.path)!r} has {disk.free / 1e9:.1f} GB free, but "
                f"{recipe.checkpoint.keep + 1} checkpoints take {need / 1e9:.1f} GB"
            )
        folder.checkpoint_folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.checkpoint_folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        for checkpoint in folder.checkpoints():
            if checkpoint.step > step:
                shutil.rmtree(checkpoint.path)
        recipe.save(folder.recipe_file)
        metrics.cut_back(step)
    except OSError as error:
        raise UserError(
            f"output {str(folder.path)!r} cannot be written to: {error.strerror or error}"
        ) from error
