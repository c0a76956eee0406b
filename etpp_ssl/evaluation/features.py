"""Frozen features through timm's own, unmodified forward, and their file.

In fp32 they are what an export gives, to the last bit. Those of a data set are one safetensors file:

    features    float32 (n, D)
    labels      int64 (n,), -1 without labels
    indices     int64 (n,), the images' numbers in their split
    names       uint8, the images' names in UTF-8 with a zero byte between two

and, where images are parts of files (`data.tile`, `data.frames`), whose names are `file#row,column`,
`file#frame`, or `file#frame,row,column`:

    frames      int64 (n,), number of the frame in its file
    corners     int64 (n, 2), row and column of the window's upper left pixel in its file
    transforms  float64 (n, 6), GDAL's geotransform of the window, NaN where the file has none
    crs         int64 (n,), which coordinate system of the JSON list `crs_names` in the metadata

The names are a tensor because the metadata of the format ends at 100 MB, which the names of a large data
set exceed. Without this package, this reads them:

    tensors = safetensors.numpy.load_file("train.safetensors")
    names = tensors["names"].tobytes().decode(errors="surrogateescape").split("\0")

The metadata says how the features were made; its `classes` is a JSON list, or null without labels.

Legend: B batch, D width, n images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.data.channels import mean_over_channels
from etpp_ssl.data.formats.base import Place
from etpp_ssl.data.loader import Batch, BatchBuilder, evaluation_requests, load_batches
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder, process_part
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.windows import PartSource
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.files import replaced_file, save_tensors
from etpp_ssl.messages import shown
from etpp_ssl.model.encoders import encoder_of, transformer_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Pool = Literal["token", "avg"]
Precision = Literal["fp32", "bf16"]
"""Of the forward pass; the features themselves are float32 in any case."""

CPU_IMAGES = 64
"""Images per forward pass on a CPU at most. More are not faster: the activations of a small ViT then exceed
32 MB, above which glibc maps each of them anew, and a third of the time is spent on page faults."""


class Features(NamedTuple):
    """Features and labels of n images."""

    features: Tensor
    """float32 (n, D)."""
    labels: Tensor
    """int64 (n,), -1 without labels."""
    indices: Tensor
    """int64 (n,), the images' numbers in their source."""

    def take(self, rows: Tensor) -> Features:
        """Some of the rows, by a mask bool (n,) or by their numbers."""
        return Features(self.features[rows], self.labels[rows], self.indices[rows])


def num_features(net: Any) -> int:
    """D, the width of what a timm network's head reads."""
    # That of networks with a hidden layer in front of their head; others do not always have it.
    return int(getattr(net, "head_hidden_size", None) or net.num_features)


def pool_of(net: Any) -> str:
    """The name of a timm network's own pooling."""
    pool = getattr(net, "global_pool", "avg")
    return pool if isinstance(pool, str) else str(getattr(pool, "pool_type", "avg"))


def check_pool(net: Any, pool: Pool | None) -> None:
    """Check that a network has a pooling.

    Raises:
        UserError: if it does not.
    """
    if pool is None:
        return
    if pool not in ("token", "avg"):
        raise UserError(f"pool is {shown(pool)}; valid are 'token', 'avg' and None")
    encoder = transformer_of(net)
    if encoder is None:
        raise UserError(f"pool is {pool}, but a {type(net).__name__} has its own pooling; use None")
    if pool == "token" and not encoder.has_class_token:
        raise UserError("pool is token, but the encoder has no cls token; use avg")


def pooled(net: Any, tokens: Tensor, pool: Pool | None) -> Tensor:
    """One vector per image: what a head would read, or another pooling.

    Args:
        net: a timm network in eval mode.
        tokens: what its `forward_features` gives.
        pool: None is the network's own; see `check_pool`.

    Returns:
        (B, D).
    """
    if pool is None:
        features: Tensor = net.forward_head(tokens, pre_logits=True)
        return features
    return encoder_of(net).pool(tokens, pool)


def pooled_features(net: Any, images: Tensor, pool: Pool | None = None) -> Tensor:
    """One vector per image, by the network's own, unmodified forward.

    Args:
        net: a timm network in eval mode.
        images: normalised float32 (B, C, H, W) at full resolution, unmasked.
        pool: cls token, mean of the patch tokens, or None for the network's own.

    Returns:
        float32 (B, D).

    Raises:
        UserError: for a pooling that the network does not have.
    """
    check_pool(net, pool)
    return pooled(net, net.forward_features(images), pool)


@dataclass(frozen=True, kw_only=True)
class EvaluationLoader:
    """Loads images in the evaluation view, on the device of each process."""

    accelerator: Accelerator
    """The device and the processes."""
    view: EvalView
    """How they are cropped and resized."""
    normalise: Normalise
    """From uint8 to the network's input."""
    num_workers: int
    """Data worker processes."""
    stall_seconds: float | None = None
    """How long to wait for a batch; see `etpp_ssl.data.loader.load_batches`."""

    def batches(self, source: ImageSource, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """This process's part of `indices`, in order."""
        accelerator = self.accelerator
        part = process_part(range(len(indices)), accelerator.process_index, accelerator.num_processes)
        wanted = [indices[i] for i in part]
        requests = evaluation_requests(wanted, size=self.view.image_size, batch_size=batch_size)
        builder = BatchBuilder(source, self.view, KeyedOrder(len(source), 0))
        # Small evaluations are done before worker processes have started.
        yield from self.load(builder, requests, self.num_workers if len(part) > 4 * batch_size else 0)

    def load(
        self, builder: BatchBuilder, requests: Iterable[BatchRequest], num_workers: int
    ) -> Iterator[Batch]:
        """The batches of some requests, on the device."""
        device = self.accelerator.device
        for batch in load_batches(
            builder,
            requests,
            num_workers=num_workers,
            prefetch=2,
            pin_memory=device.type == "cuda",
            stall_seconds=self.stall_seconds,
        ):
            yield batch.to(device)


@torch.inference_mode()
def extract_features(
    loader: EvaluationLoader,
    encoder: nn.Module,
    source: ImageSource,
    indices: Sequence[int],
    *,
    pool: Pool | None,
    batch_size: int,
    precision: Precision | None = None,
) -> Features:
    """Features and labels of some images, each exactly once for any number of processes.

    Unreadable images are left out.

    Args:
        loader: reads them.
        encoder: a timm network in any mode, which it keeps.
        source: the images.
        indices: which of them.
        pool: see `pooled_features`.
        batch_size: images that are loaded together.
        precision: of the forward pass; None is `run_precision`.

    Returns:
        On the accelerator's device, in the order of `indices`.
    """
    accelerator = loader.accelerator
    device = accelerator.device

    def features_of(images: Tensor) -> Tensor:
        return pooled_features(encoder, loader.normalise(images), pool).float()

    most = images_per_pass(batch_size, device)
    features = [torch.empty(0, num_features(encoder), device=device)]
    labels = [torch.empty(0, dtype=torch.int64, device=device)]
    positions = [torch.empty(0, dtype=torch.int64, device=device)]
    with forward_pass(encoder, device, precision or run_precision(accelerator)):
        for batch in loader.batches(source, indices, batch_size):
            readable = readable_rows(batch)
            for rows in readable.split(most):
                images = batch.images[rows]
                features.append(mean_over_channels(images, loader.normalise.num_channels, features_of))
            labels.append(batch.labels[readable])
            positions.append(batch.sample_ids[readable])
    return Features(*(gather_rows(torch.cat(rows), accelerator) for rows in (features, labels, positions)))


def images_per_pass(batch_size: int, device: torch.device) -> int:
    """Images that go through the encoder together: `batch_size` on an accelerator, fewer on a CPU."""
    return min(batch_size, CPU_IMAGES) if device.type == "cpu" else batch_size


@contextmanager
def forward_pass(model: nn.Module, device: torch.device, precision: Precision) -> Iterator[None]:
    """Where features are computed: eval mode, no gradients, and bf16 if that is the precision.

    Enter it once around all batches: the weights are then cast to bf16 once.

    Args:
        model: in any mode, which it has again afterwards.
        device: where the model is.
        precision: of the forward pass.
    """
    half = precision == "bf16"
    with torch.inference_mode(), evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=half):
        yield


def run_precision(accelerator: Accelerator) -> Precision:
    """bf16 in a bf16 run, otherwise fp32.

    A run in fp16 was made for a device without bf16 units, and half the exponent range of fp32 is enough
    for training under a loss scale, not for every trained encoder's activations.
    """
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def readable_rows(batch: Batch) -> Tensor:
    """Rows of an evaluation batch that hold the image asked for, not an unreadable one's substitute."""
    bad = {image.index for image in batch.bad}
    rows = [row for row, index in enumerate(batch.request.indices) if index not in bad]
    return torch.tensor(rows, dtype=torch.int64, device=batch.images.device)


def gather_rows(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """All processes' rows, in the order of the processes; their numbers may differ."""
    if accelerator.num_processes == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = accelerator.gather(count).tolist()
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = accelerator.gather(padded).split(max(counts))
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has the mode of before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


TENSORS = ("features", "labels", "indices", "names")
WINDOW_TENSORS = ("frames", "corners", "transforms", "crs")


class Windows(NamedTuple):
    """Where n parts of files lie."""

    frames: Tensor
    """int64 (n,), numbers of the frames in their files."""
    corners: Tensor
    """int64 (n, 2), row and column in pixels of the file."""
    transforms: Tensor
    """float64 (n, 6), see `etpp_ssl.data.formats.base.Place`; NaN where the file does not tell."""
    crs: Tensor
    """int64 (n,), numbers in `crs_names`."""
    crs_names: list[str]

    @classmethod
    def of(cls, source: PartSource, indices: Sequence[int]) -> Windows:
        """Those of some images of a source."""
        known: dict[str, int] = {}
        frames = torch.zeros(len(indices), dtype=torch.int64)
        corners = torch.zeros(len(indices), 2, dtype=torch.int64)
        transforms = torch.full((len(indices), 6), torch.nan, dtype=torch.float64)
        crs = torch.zeros(len(indices), dtype=torch.int64)
        for n, index in enumerate(indices):
            place = source.place(index) or _NOWHERE
            part = source.part(index)
            frames[n], corners[n] = part.frame, torch.tensor((part.row, part.column))
            transforms[n] = torch.tensor(place.transform, dtype=torch.float64)
            crs[n] = known.setdefault(place.crs, len(known))
        return cls(frames, corners, transforms, crs, list(known))


_NOWHERE = Place((math.nan,) * 6, "")


@dataclass(frozen=True)
class Embeddings:
    """Features of n images, on the CPU, and what the images are."""

    rows: Features
    names: list[str]
    """n of them, as the data source gives them: relative paths, for instance."""
    classes: list[str] | None
    """Class names, in the order of the labels."""
    notes: dict[str, str]
    """How the features were made."""
    windows: Windows | None = None
    """Of images that are parts of files."""


def write_embeddings(file: Path, embeddings: Embeddings) -> None:
    """Write a file, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    text = "\0".join(name.replace("\0", "\N{REPLACEMENT CHARACTER}") for name in embeddings.names)
    # Linux allows any bytes in a file's name; Python shows those that are not UTF-8 as lone surrogates.
    names = np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8).copy()
    tensors = {
        **{key: rows.contiguous() for key, rows in embeddings.rows._asdict().items()},
        "names": torch.from_numpy(names),
    }
    metadata = {"format": "pt", **embeddings.notes, "classes": json.dumps(embeddings.classes)}
    if embeddings.windows is not None:
        *places, crs_names = embeddings.windows
        tensors.update(zip(WINDOW_TENSORS, places, strict=True))
        metadata["crs_names"] = json.dumps(crs_names)
    with replaced_file(file) as aside:
        save_tensors(tensors, aside, metadata)


def read_embeddings(file: str | Path) -> Embeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        UserError: if the file is not there or holds something else.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            there = set(opened.keys())
            missing = sorted(set(TENSORS) - there)
            if missing:
                raise UserError(f"{str(file)!r} holds no embeddings: it lacks {', '.join(missing)}")
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in TENSORS}
            places = {key: opened.get_tensor(key) for key in WINDOW_TENSORS if key in there}
            notes = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}") from error
    text = tensors.pop("names").numpy().tobytes().decode(errors="surrogateescape")
    classes = json.loads(notes.pop("classes", "null"))
    notes.pop("format", None)
    crs_names = json.loads(notes.pop("crs_names", "[]"))
    windows = Windows(**places, crs_names=crs_names) if len(places) == len(WINDOW_TENSORS) else None
    return Embeddings(Features(**tensors), text.split("\0"), classes, notes, windows)
