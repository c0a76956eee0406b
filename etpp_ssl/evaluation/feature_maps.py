"""Features of any timm network at any legal size: tokens, maps of them, and one vector per image.

At the network's own size this is timm's own, unmodified forward.

Legend: B batch, C channels, H, W pixels, h, w entries of a map, p, q pixels per entry, N = h w patches,
P prefix tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.model.encoders import MaskableEncoder, encode_visible, maskable
from etpp_ssl.model.patches import grid_of
from etpp_ssl.model.pos_embed import sincos_table
from etpp_ssl.model.timm_net import stride_of


def map_stride(net: Any) -> tuple[int, int]:
    """(p, q) pixels per entry of a map; see `stride_of`.

    Raises:
        UserError: if the network does not tell its stride.
    """
    stride = stride_of(net)
    if stride is None:
        raise UserError(f"a {type(net).__name__} does not tell its stride, so it has no map of patches")
    return stride


def check_whole(size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Check that an image size is whole patches.

    Raises:
        UserError: naming the nearest sizes that are.
    """
    less = [max(side // step, 1) * step for side, step in zip(size, patch, strict=True)]
    more = [math.ceil(side / step) * step for side, step in zip(size, patch, strict=True)]
    nearest = list(dict.fromkeys([(less[0], less[1]), (more[0], more[1])]))
    if nearest != [size]:
        legal = " and ".join(map(show_size, nearest))
        raise UserError(
            f"{size[0]}x{size[1]} px (height x width) is not whole patches of {show_size(patch)} px; the "
            f"nearest legal size{'s are' if len(nearest) > 1 else ' is'} {legal}"
        )


def tokens_of(net: Any, images: Tensor, own_size: tuple[int, int]) -> Tensor:
    """A network's features in front of its pooling.

    At another size a ViT's positions cover the same scene: an encoder's sin-cos ones are computed at the new
    patch centres, as in pre-training; learned ones and a classifier's are resampled, as in fine-tuning.

    Args:
        net: a timm network in eval mode.
        images: normalised float32 (B, C, H, W).
        own_size: (H, W) that the network was built for.

    Returns:
        (B, P + N, D), or a map with the channels first or last.

    Raises:
        UserError: if the network does not run at this size.
    """
    size = (images.shape[-2], images.shape[-1])
    # Somebody may have halved the model.
    images = images.to(next(net.parameters()).dtype)
    if size == own_size:
        return _forward(net, images)
    check_whole(size, map_stride(net))
    encoder = maskable(net)
    if isinstance(encoder, MaskableEncoder) and not net.dynamic_img_size:
        return _tokens_at(encoder, images, grid_of(size, encoder.patch_size))
    try:
        return _forward(net, images)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        kind, reason = type(net).__name__, str(error).split("\n")[0] or type(error).__name__
        raise UserError(
            f"a {kind} for {show_size(own_size)} px does not run at {show_size(size)} px: {reason}"
        ) from error


def map_of(net: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """The features as a map.

    Args:
        net: a timm network.
        tokens: from `tokens_of`.
        size: (H, W) of the images in pixels.

    Returns:
        (B, h, w, D).

    Raises:
        UserError: if they are no map.
    """
    if tokens.ndim == 3:
        grid = grid_of(size, map_stride(net))
        patches = tokens[:, int(getattr(net, "num_prefix_tokens", 0)) :]
        if patches.shape[1] == grid[0] * grid[1]:
            rows: Tensor = patches.unflatten(1, grid)
            return rows
    elif tokens.ndim == 4:
        channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        return tokens if channels_last else tokens.permute(0, 2, 3, 1)
    raise UserError(f"a {type(net).__name__} gives no map of patches")


def _forward(net: Any, images: Tensor) -> Tensor:
    tokens: Tensor = net.forward_features(images)
    return tokens


def _tokens_at(encoder: MaskableEncoder, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """An encoder at another size, as it is trained at other bandwidths."""
    net, fixed = encoder.net, None
    if net.pos_embed is not None and not net.num_classes:
        table = sincos_table(net.pos_embed.detach().cpu(), encoder.num_prefix_positions, encoder.grid)
        fixed = None if table is None else encoder.sincos_at(grid, table.position_grid)
    return encode_visible(net, images, None, positions=fixed)
