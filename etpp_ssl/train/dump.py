"""What a step that is not finite consisted of, written so that one command repeats it.

    RUN/dumps/step-XXXXXXXX/     the number is the step's as it is told, counted from 1
        recipe.yaml              the resolved recipe
        model.safetensors        the weights that the step started with
        rank-N.safetensors       process N's micro-batches: K.images, K.labels and K.positions
        rank-N.json              what else belongs to them, and the images' names
        dump.json                learning rate, number of processes, versions ...

A dump needs neither its run folder nor the data: `etpp replay-nan` reads it anywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor

from etpp_ssl.config import Config
from etpp_ssl.data.loader import Batch
from etpp_ssl.dist.sharding import whole_tensors
from etpp_ssl.files import save_tensors
from etpp_ssl.run_folder import MODEL_FILE
from etpp_ssl.train.run import Run

RECIPE_FILE = "recipe.yaml"
RECORD_FILE = "dump.json"
KEPT = 3
"""Newest dumps of a run that stay."""


class MicroBatchRecord(Config):
    """What belongs to a micro-batch beside its tensors; see `Batch` and `BatchRequest`."""

    step: int = Field(ge=0)
    positions: tuple[int, ...] = Field(min_length=1)
    """The samples' numbers in the run; the tensor's differ from them where images are replayed."""
    indices: tuple[int, ...]
    names: tuple[str, ...]
    """Of the images, without characters that a terminal would act on."""
    first_position: int
    bandwidth: tuple[int, int]
    progress: float = Field(ge=0, le=1)
    weight: float = Field(gt=0, le=1)
    last: bool


class ProcessRecord(Config):
    """The micro-batches of one process."""

    micro_batches: tuple[MicroBatchRecord, ...] = Field(min_length=1)


class DumpRecord(Config):
    """What a dump knows of its step."""

    format: Literal[1]
    step: int = Field(ge=0)
    """Counted from 0."""
    lr: float
    """The learning rate that the optimizer would have stepped with."""
    lr_factor: float
    stage: int
    batch_size: int
    """Images of the step, over all processes."""
    num_processes: int = Field(ge=1)
    precision: str
    num_classes: int | None = Field(ge=1)
    """Of a classifier."""
    scaler: dict[str, float] | None
    """State of the loss scaler, under float16."""
    environment: dict[str, str]
    """Versions, threads, device; see `etpp_ssl.run_state.environment`."""


def write_dump(run: Run, step: int, batches: list[Batch]) -> Path | None:
    """Write weights and batches of a step; every process must call it.

    The folder is written aside and renamed; the newest `KEPT` stay. One that cannot be written
    costs one line of warning, and no run ends for it.

    Args:
        run: the run, whose weights are still those that the step started with.
        step: the optimizer step, counted from 0.
        batches: this process's micro-batches of the step, on the host.

    Returns:
        The folder, or None, on all processes, where it was not written.
    """
    folder = run.folder.dump_folder / dump_name(step)
    aside = folder.with_name(f".writing-{folder.name}")
    tensors = _whole_weights(run)
    # What one process cannot do, all leave: each of these brings them together.
    written = (
        _done_by_all(run, step, partial(_begin, run, aside))
        and _done_by_all(run, step, partial(_write_part, run, step, batches, tensors, aside))
        and _done_by_all(run, step, partial(_finish, run, aside, folder))
    )
    if written:
        return folder
    shutil.rmtree(aside, ignore_errors=True)
    return None


def dump_name(step: int) -> str:
    """The folder of a step that is counted from 0; its number is the one that users are told."""
    return f"step-{step + 1:08d}"


def part_name(rank: int) -> str:
    """The files of a process, without their ending."""
    return f"rank-{rank}"


def tensor_names(number: int) -> tuple[str, str, str]:
    """Names of images, labels and positions of a process's micro-batch."""
    return f"{number}.images", f"{number}.labels", f"{number}.positions"


def escaped(name: str) -> str:
    """A name of one line that any terminal can show: `\\n`, `\\x1b` or `\\udcff` for what it cannot."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def _whole_weights(run: Run) -> dict[str, Tensor]:
    """All weights of the bare model, on the main process; every process must call it."""
    whole = whole_tensors(run.bare_model.state_dict(), keep=run.accelerator.is_main_process)
    return {name: tensor.detach().contiguous() for name, tensor in whole.items()}


def _done_by_all(run: Run, step: int, act: Callable[[], None]) -> bool:
    """Whether every process did its part; the main one says why not."""
    fault = None
    try:
        act()
    except Exception as error:
        # Whatever it is: the other processes wait for this one's word.
        fault = " ".join(f"{error or type(error).__name__}".split())
    faults = [(rank, fault) for rank, fault in enumerate(gather_object([fault])) if fault is not None]
    if faults:
        rank, fault = faults[0]
        by = f"process {rank}: " if run.accelerator.num_processes > 1 else ""
        run.progress.say(
            f"warning: step {step + 1} is not finite, but no dump of it was written: {by}{fault}"
        )
    return not faults


def _begin(run: Run, aside: Path) -> None:
    if run.accelerator.is_main_process:
        for leftover in aside.parent.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir(parents=True)


def _write_part(
    run: Run, step: int, batches: list[Batch], tensors: Mapping[str, Tensor], aside: Path
) -> None:
    # By every process: a network file system may take long to show it what another one made.
    aside.mkdir(exist_ok=True)
    part = aside / part_name(run.accelerator.process_index)
    loaded: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        own = (batch.images, batch.labels, batch.sample_ids)
        loaded |= {name: own.contiguous() for name, own in zip(tensor_names(number), own, strict=True)}
    save_tensors(loaded, part.with_suffix(".safetensors"))
    record = ProcessRecord(micro_batches=tuple(_record(run, batch) for batch in batches))
    part.with_suffix(".json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
    if run.accelerator.is_main_process:
        run.recipe.save(aside / RECIPE_FILE)
        save_tensors(tensors, aside / MODEL_FILE)
        text = _step_record(run, step).model_dump_json(indent=1)
        (aside / RECORD_FILE).write_text(text, encoding="utf-8")


def _finish(run: Run, aside: Path, folder: Path) -> None:
    if not run.accelerator.is_main_process:
        return
    for rank in range(run.accelerator.num_processes):
        for ending in (".safetensors", ".json"):
            # On nodes that share no disk the others' parts are elsewhere.
            (aside / part_name(rank)).with_suffix(ending).stat()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    dumps = sorted(folder.parent.glob("step-*"), key=lambda dump: (dump.stat().st_mtime_ns, dump.name))
    for old in dumps[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _record(run: Run, batch: Batch) -> MicroBatchRecord:
    request, replaced = batch.request, {image.index for image in batch.bad}
    names = (
        escaped(run.source.name(index)) + (" (unreadable, another in its place)" if index in replaced else "")
        for index in request.indices
    )
    return MicroBatchRecord(
        step=request.step,
        positions=request.sample_ids,
        indices=request.indices,
        names=tuple(names),
        first_position=batch.first_sample_id,
        bandwidth=request.bandwidth,
        progress=request.progress,
        weight=request.weight,
        last=request.last,
    )


def _step_record(run: Run, step: int) -> DumpRecord:
    stage, accelerator = run.curriculum.stage_at(step), run.accelerator
    return DumpRecord(
        format=1,
        step=step,
        lr=run.learning_rate(stage),
        lr_factor=run.state.lr_factor,
        stage=stage.index,
        batch_size=stage.batch_size,
        num_processes=accelerator.num_processes,
        precision=run.recipe.precision,
        num_classes=run.task.num_classes,
        scaler=accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        environment=run.environment,
    )
