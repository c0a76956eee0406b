"""Frozen features through timm's own, unmodified forward: what an export gives, to the last bit.

Legend: B batch, D width, n images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.data.augment import EvalView, Normalise
from etpp_ssl.data.images import ImageSource
from etpp_ssl.data.loader import Batch, BatchBuilder, batch_loader, batches, evaluation_requests
from etpp_ssl.data.sampler import KeyedOrder, process_part

Pool = Literal["token", "avg"]


def pooled_features(encoder: VisionTransformer, images: Tensor, pool: Pool | None = None) -> Tensor:
    """One vector per image.

    Args:
        encoder: in eval mode.
        images: normalised float32 (B, C, H, W) at full resolution, unmasked.
        pool: cls token, mean of the patch tokens, or None for the encoder's own.

    Returns:
        float32 (B, D).

    Raises:
        UserError: for "token" where the encoder has no cls token.
    """
    if pool is None or pool == encoder.global_pool:
        features: Tensor = encoder(images)
        return features
    if pool == "token" and not encoder.has_class_token:
        raise UserError("probe.pool is token, but the encoder has no cls token; use avg")
    pooled: Tensor = encoder.pool(encoder.forward_features(images), pool_type=pool)
    return pooled


@torch.inference_mode()
def extract_features(
    encoder: VisionTransformer,
    source: ImageSource,
    indices: list[int],
    *,
    view: EvalView,
    normalise: Normalise,
    accelerator: Accelerator,
    pool: Pool | None,
    batch_size: int,
    num_workers: int,
) -> tuple[Tensor, Tensor]:
    """Features and labels of some images, each exactly once for any number of processes.

    Unreadable images are left out.

    Returns:
        float32 (n, D) and int64 (n,) on the accelerator's device, in the order of `indices`.
    """
    features, labels = [], []
    with evaluating(encoder):
        for batch in evaluation_batches(
            source, indices, view, accelerator, batch_size=batch_size, num_workers=num_workers
        ):
            readable = readable_rows(batch)
            images = normalise(batch.images[readable])
            features.append(pooled_features(encoder, images, pool).float())
            labels.append(batch.labels[readable])
    width = encoder.num_features
    device = accelerator.device
    empty = torch.empty(0, width, device=device), torch.empty(0, dtype=torch.int64, device=device)
    return (
        gather_rows(torch.cat([empty[0], *features]), accelerator),
        gather_rows(torch.cat([empty[1], *labels]), accelerator),
    )


def evaluation_batches(
    source: ImageSource,
    indices: list[int],
    view: EvalView,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """This process's part of `indices`, in order, on the accelerator's device."""
    part = process_part(range(len(indices)), accelerator.process_index, accelerator.num_processes)
    requests = evaluation_requests([indices[i] for i in part], size=view.image_size, batch_size=batch_size)
    # Small evaluations are done before worker processes have started.
    workers = num_workers if len(part) > 4 * batch_size else 0
    loader = batch_loader(
        BatchBuilder(source, view, KeyedOrder(len(source), 0)),
        requests,
        num_workers=workers,
        prefetch=2,
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in batches(loader):
        yield batch.to(accelerator.device)


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
