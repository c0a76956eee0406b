"""Where a run starts: new, resumed or forked; its folder, and the lock on it.

Before a new one, whether 8 bits can hold what it is about to read without `data.range`.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from etpp_ssl.config import UserError, shown_bytes
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.hours import TimePlan, replan
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import Subset, read_anew
from etpp_ssl.data.sources.synthetic import SyntheticSource
from etpp_ssl.data.statistics import Channel, Values, values_of
from etpp_ssl.data.streams.sample import StreamSample
from etpp_ssl.data.training import IndexedImages, TrainingImages
from etpp_ssl.files import write_text
from etpp_ssl.randomness import derive_key
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.recipe_file import changed_keys
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.run_state import TrainState, check_state
from etpp_ssl.train.checkpoint import checkpoint_bytes

LOCK_FILE = ".lock"


class FolderLock:
    """Held by the process that writes to a run folder; the system releases it with the process.

    A launcher that was killed alone leaves its processes training: a second start must not write beside
    them. Data workers, which outlive a killed process for a moment, do not inherit the lock.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.held = False
        """Whether the folder is this process's; where there are no locks, whether it has asked."""
        self._lock = FileLock(self.path, timeout=0, fallback_to_soft=False)

    def acquire(self) -> None:
        """Take the lock, where there is a folder; nothing happens if it is held already.

        A file system without locks gives none, and no error.

        Raises:
            UserError: if another process holds it, naming that process.
            OSError: if the folder cannot be written to.
        """
        if self.held or not os.path.isdir(self.path.parent):
            return
        self.path.open("a").close()
        try:
            self._lock.acquire()
        except Timeout as error:
            holder = ""
            with suppress(OSError):  # Windows lets nobody read what is locked.
                holder = self.path.read_text(encoding="utf-8", errors="replace")[:200].strip()
            raise UserError(
                f"run {str(self.path.parent)!r} is being trained by {holder or 'another process'}; stop that "
                f"first, or choose another output"
            ) from error
        except (OSError, NotImplementedError):
            self.held = True
            return
        self.held = True
        # Only for the message; on a full disk the lock holds all the same.
        with suppress(OSError):
            self.path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    def release(self) -> None:
        """Give the lock back, where it is held."""
        with suppress(OSError):
            self._lock.release()
        self.held = False


def starting_point(
    recipe: Recipe | FinetuneRecipe,
    folder: RunFolder,
    source: TrainingImages,
    curriculum: Curriculum,
    fork: Path | None,
    say: Callable[[str], None],
) -> tuple[Checkpoint | None, TrainState]:
    """The checkpoint to start from, or None, and the state to start with.

    Args:
        recipe: the run.
        folder: its folder, which may hold an earlier part of it.
        source: the training images.
        curriculum: its stages.
        fork: another run folder, or a checkpoint in one, to start from where `folder` has none.
        say: is told of damaged checkpoints and of what was chosen.

    Raises:
        UserError: if the folder's run has another recipe, other data or no readable checkpoint, the forked
            run has no step of this recipe left, or a budget in hours cannot be continued from it.
    """
    start = None
    if folder.exists():
        changed = changed_keys(folder.any_recipe(), recipe)
        if changed:
            raise UserError(
                f"run {str(folder.path)!r} was started with other settings: {'; '.join(changed)}; keep "
                f"the old ones, or use --fork {folder.path} with another output"
            )
        start = folder.newest(say)
    elif os.path.isdir(folder.path) and not all(_is_leftover(path) for path in folder.path.iterdir()):
        raise UserError(
            f"output {str(folder.path)!r} is a folder with other files in it and no run; choose another"
        )
    forked = start is None and fork is not None
    if forked:
        assert fork is not None
        start = _forked_checkpoint(fork, say)
    if start is None:
        return None, TrainState()
    saved = start.state()
    try:
        state = check_state(saved, start.step)
    except ValueError as error:
        raise UserError(f"checkpoint {str(start.path)!r} cannot be resumed: {error}") from error
    if saved["data"] != source.fingerprint() and not forked:
        raise UserError(
            f"the data is not what run {str(folder.path)!r} was started with: files were added, removed or "
            f"renamed; use --fork {folder.path} with another output to continue with these"
        )
    if not forked:
        planned = curriculum if state.plan is None else curriculum.laid_out(state.plan.segments)
        if state.step < planned.num_steps:
            say(f"resuming {folder.path} at step {state.step}")
        return start, state
    plan = _plan_of_fork(recipe.budget_hours, curriculum, state, start)
    laid_out = curriculum if plan is None else curriculum.laid_out(plan.segments)
    if state.step == laid_out.num_steps:
        raise UserError(
            f"{start.path} has all of this recipe's {state.step} steps behind it, so that nothing is left "
            f"for a fork; give a larger budget"
        )
    spent, cooldown = laid_out.progress_after(state.step), recipe.optim.cooldown or 0.0
    # Steps are whole ones.
    if recipe.optim.schedule == "wsd" and spent > 1 - cooldown + 1 / laid_out.num_steps:
        raise UserError(
            f"optim.cooldown {cooldown:g} is more than what is left: at {start.path} {spent:.3g} of this "
            f"recipe's compute is spent; fork an earlier checkpoint, or give a larger budget or a shorter "
            f"cooldown"
        )
    say(f"forked from {start.path} at step {state.step}")
    # Counts that are told beside all images since the first step count from there, too. The rest is the old
    # run's own: losses of no row yet, unreadable images by number, the place in a stream, rewinds and what
    # they made of its learning rate.
    kept = TrainState(
        step=state.step,
        seconds=state.seconds,
        elapsed=state.elapsed,
        plan=plan,
        num_outside=state.num_outside,
        num_without_data=state.num_without_data,
    )
    return start, kept


def _forked_checkpoint(fork: Path, say: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint of a run, or the one that is named."""
    run = RunFolder(fork.parent.parent)
    for checkpoint in run.checkpoints() if fork.parent.name == "checkpoints" else ():
        if checkpoint.path.name == fork.name:
            fault = checkpoint.fault()
            if fault is not None:
                raise UserError(f"--fork: {str(fork)!r} {fault}")
            return checkpoint
    return RunFolder(fork).trained(say)


def _is_leftover(path: Path) -> bool:
    """Whether it is of a run that was killed before it had a recipe, of its trials, or of a probe of other
    weights."""
    return path.name.startswith(".writing-") or path.name in (LOCK_FILE, "report", "trials")


def _plan_of_fork(
    hours: float | None, curriculum: Curriculum, state: TrainState, start: Checkpoint
) -> TimePlan | None:
    """The forked run's plan in hours, with its future fitted to a budget of `hours`."""
    if hours is None:
        return None
    plan = state.plan
    if plan is None or plan.stages != curriculum.portions:
        what = "no plan in hours" if plan is None else "a plan of other stages"
        raise UserError(
            f"budget_hours {hours:g} cannot continue {start.path}, which has {what}; give budget_epochs"
        )
    if plan.hours == hours:
        return plan
    if state.step == curriculum.laid_out(plan.segments).num_steps:
        raise UserError(
            f"budget_hours {hours:g} cannot prolong {start.path}, whose run of {plan.hours:g} "
            f"hours is finished; give budget_epochs"
        )
    return replan(curriculum, plan, step=state.step, elapsed=state.elapsed, hours=hours)


def check_room(folder: RunFolder, keep: int, size: int) -> None:
    """See that a disk has room for the checkpoints to come, and for one more while it is written.

    Args:
        folder: the run's.
        keep: checkpoints that stay.
        size: bytes of the model's weights and the optimizer's state, where there is no checkpoint yet.

    Raises:
        UserError: if it has not.
    """
    there = folder.checkpoints()
    if there and there[0].fault() is None:
        size = checkpoint_bytes(there[0])
    count = max(1, keep + 1 - len(there))
    path = folder.path.absolute()
    disk = shutil.disk_usage(next(p for p in [path, *path.parents] if p.exists()))
    if disk.total and disk.free < count * size:
        raise UserError(
            f"output {str(folder.path)!r} has {shown_bytes(disk.free)} free, but {count} more checkpoints "
            f"take {shown_bytes(count * size)}: make room, or lower checkpoint.keep"
        )


def write_plan(folder: RunFolder, plan: TimePlan | None) -> None:
    """Put a plan in hours where people and `etpp plan` find it; the checkpoints have it, too.

    Raises:
        UserError: if it cannot be written.
    """
    if plan is not None:
        write_text(folder.plan_file, json.dumps(plan.to_json(), indent=1))


SAMPLE = 32
"""Images that are looked at: of photographs their headers only."""
MOST_PIXELS = 1024
"""On a side, of the middle of an image that is looked at."""
FEWEST_LEVELS = 64
"""Different values of 8 bits that each channel of 16 bits should keep."""
LEAST_SHARE = 1 / 16
"""Of the range of 16 bits, that values should reach over."""
REMEDY = "`etpp inspect` with this recipe proposes data.range, which keeps them"


def check_depth(images: TrainingImages, reading: Reading, stall_seconds: float | None) -> str:
    """What a start says of images that a run without `data.range` reads; "" for those of 8 bits.

    What cannot be read, or not in time, is not looked at: the loader has a sentence for that.

    Args:
        images: to train on.
        reading: how they become pictures.
        stall_seconds: how long the look may take; None is for ever.

    Raises:
        UserError: if 8 bits lose what the images hold: integers of 16 bits that use few of them, other types,
            or several types.
    """
    if reading.deep:
        return ""
    if isinstance(images, IndexedImages):
        source = images.source
        whole = source.source if isinstance(source, Subset) else source
        if isinstance(whole, SyntheticSource) and whole.dtype == "uint8":
            return ""  # They have no header: each would be drawn.
    seen = Future[tuple[Values, int]]()

    def look() -> None:
        try:
            seen.set_result(_look(images, reading))
        except BaseException as error:
            seen.set_exception(error)

    # An executor would wait for its thread when the process ends.
    threading.Thread(target=look, daemon=True).start()
    try:
        values, num_shallow = seen.result(stall_seconds)
    except TimeoutError:
        return ""
    count = dict(values.num_images)
    if num_shallow:
        count["uint8"] = count.get("uint8", 0) + num_shallow
    if len(count) > 1:
        found = ", ".join(f"{number} of {name}" for name, number in sorted(count.items()))
        raise UserError(f"data: images of several types ({found} in a sample) are read as 8 bits: {REMEDY}")
    if not count or "uint8" in count:
        return ""
    ((name, channels),) = values.channels.items()
    differing = [channel for channel in channels if channel.least < channel.most] or channels
    if not differing:
        return ""
    extent = f"from {_plain(min(c.least for c in channels))} to {_plain(max(c.most for c in channels))}"
    if name != "uint16":
        raise UserError(f"data: the images hold {name} values {extent}, which 8 bits do not: {REMEDY}")
    fewest = min(_levels(channel) for channel in differing)
    if fewest < FEWEST_LEVELS or any(c.most - c.least < LEAST_SHARE * 2**16 for c in differing):
        raise UserError(
            f"data: the images hold uint16 values {extent}, of which 8 bits leave {fewest} "
            f"level{'s' * (fewest != 1)}: {REMEDY}"
        )
    return "data: of 16 bits the high byte is kept; data.range=[0,65535] keeps all"


def _levels(channel: Channel) -> int:
    """Values that are left of 16 bits."""
    levels = channel.levels(shift=8)
    assert levels is not None
    return levels


def _look(images: TrainingImages, reading: Reading) -> tuple[Values, int]:
    """What a keyed sample holds that is deep, and how many images of 8 bits are not even decoded."""
    raw, values, num_shallow = replace(reading, range="raw"), Values(), 0
    source: ImageSource
    if isinstance(images, IndexedImages):
        source = read_anew(images.source, raw)
        draws = (derive_key(images.seed, "depth", number) % len(source) for number in range(SAMPLE))
        indices = sorted(set(draws))
    else:
        source = StreamSample(images.stream, SAMPLE, raw)
        indices = list(range(len(source)))
    for index in indices:
        try:
            picture = source.open(index)
            if picture.deep:
                values.add(values_of(picture, source.name(index), None, most_pixels=MOST_PIXELS))
            else:
                num_shallow += 1
        except UnreadableImage:
            continue
    return values, num_shallow


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
