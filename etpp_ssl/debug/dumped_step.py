"""A dump, read back: everything in it is checked, because it may come from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from etpp_ssl.config import Config, UserError, show_size
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.sampler import BatchRequest
from etpp_ssl.data.views import has_gaps
from etpp_ssl.messages import validation_sentence
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.run_folder import MODEL_FILE
from etpp_ssl.train.dump import (
    RECIPE_FILE,
    RECORD_FILE,
    DumpRecord,
    MicroBatchRecord,
    ProcessRecord,
    escaped,
    part_name,
    tensor_names,
)

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True)
class DumpedBatch:
    """A micro-batch of a dump."""

    rank: int
    number: int
    """Among those of its process, from 0."""
    batch: Batch
    names: tuple[str, ...]


@dataclass(frozen=True)
class DumpedStep:
    """A step as its dump has it, with a recipe that may have been overridden."""

    path: Path
    recipe: Recipe | FinetuneRecipe
    record: DumpRecord
    weights: dict[str, Tensor]
    """The bare model's, on the CPU."""
    processes: tuple[tuple[DumpedBatch, ...], ...]
    """The micro-batches of each process."""


def read_dump(path: Path, overrides: Sequence[str] = ()) -> DumpedStep:
    """Read a dump; nothing in it is executed.

    Args:
        path: its folder.
        overrides: of its recipe, as `section.key=value`.

    Raises:
        UserError: if it is not a dump, is damaged, or does not fit the recipe.
    """
    if not (path / RECORD_FILE).is_file():
        what = f"has no {RECORD_FILE}" if path.is_dir() else "is not a folder"
        raise UserError(f"{str(path)!r} is not a dump of a step that is not finite: it {what}")
    record = _json(path / RECORD_FILE, DumpRecord)
    recipe = load_any(path / RECIPE_FILE, overrides)

    def check(where: str, images: Tensor, labels: Tensor, own: MicroBatchRecord) -> None:
        if images.is_floating_point() != (recipe.data.range is not None):
            given = "null" if recipe.data.range is None else "given"
            raise UserError(
                f"{where}: its images are {images.dtype} instead of "
                f"{'float32' if recipe.data.range is not None else 'uint8'}, as data.range is {given}"
            )
        _check_fit(where, images, own, in_chans=recipe.in_chans, multiple=recipe.bandwidth_multiple)
        num_classes = record.num_classes
        if isinstance(recipe, Recipe):
            recipe.build_masker().check(own.bandwidth, (own.progress, own.progress))
        elif num_classes is None or labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"{where}: its labels are not all in 0 to num_classes - 1 ({num_classes} classes)"
            )

    processes = tuple(_process(path, rank, check) for rank in range(record.num_processes))
    return DumpedStep(path, recipe, record, _tensors(path / MODEL_FILE), processes)


def _process(
    path: Path, rank: int, check: Callable[[str, Tensor, Tensor, MicroBatchRecord], None]
) -> tuple[DumpedBatch, ...]:
    part = path / part_name(rank)
    tensors = _tensors(part.with_suffix(".safetensors"))
    records = _json(part.with_suffix(".json"), ProcessRecord).micro_batches
    found = []
    for number, own in enumerate(records):
        where = f"micro-batch {number} of {str(part.with_suffix('.safetensors'))!r}"
        missing = [name for name in tensor_names(number) if name not in tensors]
        if missing:
            raise UserError(f"{where} lacks {missing[0]}")
        images, labels, positions = (tensors[name] for name in tensor_names(number))
        _check(where, images, labels, positions, own)
        check(where, images, labels, own)
        request = BatchRequest(
            step=own.step,
            sample_ids=own.positions,
            indices=own.indices,
            bandwidth=own.bandwidth,
            progress=own.progress,
            weight=own.weight,
            last=own.last,
        )
        batch = Batch(
            images, labels, positions, own.first_position, request, bad=(), has_gaps=has_gaps(images)
        )
        found.append(DumpedBatch(rank, number, batch, tuple(escaped(name) for name in own.names)))
    return tuple(found)


def _check(where: str, images: Tensor, labels: Tensor, positions: Tensor, own: MicroBatchRecord) -> None:
    """See that a micro-batch is one."""
    if images.dtype not in (torch.uint8, torch.float32) or images.ndim != 4 or not images.numel():
        raise UserError(
            f"{where}: its images are {images.dtype} {tuple(images.shape)} instead of uint8 or float32 "
            f"(B, C, H, W)"
        )
    for what, values in (("labels", labels), ("positions", positions)):
        if values.dtype != torch.int64 or values.shape != images.shape[:1]:
            raise UserError(
                f"{where}: its {what} are {values.dtype} {tuple(values.shape)} instead of int64 "
                f"({len(images)},)"
            )
    for what, items in (("positions", own.positions), ("indices", own.indices), ("names", own.names)):
        if len(items) != len(images):
            raise UserError(f"{where} has {len(images)} images, but {len(items)} {what} are recorded")


def _check_fit(
    where: str, images: Tensor, own: MicroBatchRecord, *, in_chans: int, multiple: tuple[int, int]
) -> None:
    """See that a recipe's model can take a micro-batch."""
    size, bandwidth = (images.shape[2], images.shape[3]), own.bandwidth
    if images.shape[1] != in_chans:
        raise UserError(f"{where} has {images.shape[1]} channels, but in_chans is {in_chans}")
    axes = zip(bandwidth, multiple, size, strict=True)
    if not all(step <= shown <= pixels and shown % step == 0 for shown, step, pixels in axes):
        raise UserError(
            f"{where}: bandwidth {show_size(bandwidth)} of images of {show_size(size)} does not suit the "
            f"recipe's model: it must be a multiple of {show_size(multiple)} within the image"
        )


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {' '.join(str(error).split())}") from error
    return tensors


def _json(file: Path, kind: type[AnyConfig]) -> AnyConfig:
    try:
        return kind.model_validate_json(file.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        raise UserError(f"{str(file)!r} is damaged: {validation_sentence(error, kind)}") from None
