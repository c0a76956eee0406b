"""Patch tokens of many images, kept in bf16 by the process that computed them.

Legend: B batch, N tokens, D width, n images.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.sampler import process_part
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.evaluation.base import ProbeContext
from etpp_ssl.evaluation.features import gather_rows
from etpp_ssl.evaluation.training import evaluated

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


def patch_tokens(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """What `forward_features` gives, without the prefix tokens: (B, C, H, W) to (B, N, D)."""
    tokens: Tensor = encoder.forward_features(images)
    return tokens[:, encoder.num_prefix_tokens :]


class TokenCache:
    """This process's part of a source, each image once in the evaluation view; unreadable ones are left out.

    Args:
        context: the run.
        encoder: in eval mode.
        source: labelled images.
        micro_batch_size: images per forward pass.

    Raises:
        UserError: if the tokens do not fit into half of the device's memory.
    """

    def __init__(
        self, context: ProbeContext, encoder: VisionTransformer, source: ImageSource, micro_batch_size: int
    ) -> None:
        accelerator = context.accelerator
        device = accelerator.device
        part = process_part(range(len(source)), accelerator.process_index, accelerator.num_processes)
        self._tokens = torch.empty(0, 1, encoder.num_features, dtype=torch.bfloat16, device=device)
        labels = [torch.empty(0, dtype=torch.int64, device=device)]
        count = 0
        for tokens, labels_here in evaluated(
            context, source, lambda images: patch_tokens(encoder, images), micro_batch_size
        ):
            if count == 0:
                shape = (len(part), *tokens.shape[1:])
                _check_memory(shape, accelerator.num_processes, device)
                # Filled in place: pieces and their concatenation would take twice the memory.
                self._tokens = torch.empty(shape, dtype=torch.bfloat16, device=device)
            self._tokens[count : count + len(tokens)] = tokens
            labels.append(labels_here)
            count += len(tokens)
        self._labels = torch.cat(labels)
        counts = gather_rows(torch.tensor([count], device=device), accelerator).tolist()
        self._first = sum(counts[: accelerator.process_index])
        self.num_images = sum(counts)
        """Over all processes."""

    def take(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Of some images, by number over all processes, those that are kept here.

        Returns:
            bf16 (B, N, D) and labels int64 (B,); B may be 0.
        """
        rows = [index - self._first for index in indices]
        here = torch.tensor([row for row in rows if 0 <= row < len(self._labels)], dtype=torch.int64)
        here = here.to(self._labels.device)
        return self._tokens[here], self._labels[here]


def _check_memory(shape: tuple[int, ...], num_processes: int, device: torch.device) -> None:
    images, tokens, width = shape
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // num_processes
    needed = 2 * images * tokens * width
    if needed > memory / 2:
        raise UserError(
            f"probe.cache keeps {tokens} tokens of width {width} for {images:,} images, {needed / 1e9:,.1f} "
            f"GB in each process, more than half of its {memory / 1e9:,.1f} GB: use probe.cache=false, or a "
            f"smaller probe.num_train"
        )
