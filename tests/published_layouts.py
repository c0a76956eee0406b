"""State dicts in the layouts of published checkpoints, with random values, and what they compute.

Names and shapes are those of the checkpoints that facebookresearch/mae, timm and DeiT publish; the
forward passes are written from the papers, on the state dict alone.

Legend: B batch, N patches, K visible, D width, E decoder width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

StateDict = dict[str, Tensor]


def published_encoder(
    *,
    width: int = 64,
    depth: int = 2,
    grid: tuple[int, int] = (4, 4),
    patch: int = 4,
    in_chans: int = 3,
    learned: bool = False,
    mlp: int = 4,
    seed: int = 0,
) -> StateDict:
    """`mae_pretrain_vit_*.pth`, DeiT's without head, timm's `vit_*.mae`: all are named alike."""
    generator = torch.Generator().manual_seed(seed)
    state: StateDict = {"cls_token": torch.randn(1, 1, width, generator=generator)}
    state["pos_embed"] = sincos_with_cls(grid, width)
    if learned:
        state["pos_embed"] = torch.randn(state["pos_embed"].shape, generator=generator)
    state["patch_embed.proj.weight"] = torch.randn(width, in_chans, patch, patch, generator=generator) * 0.1
    state["patch_embed.proj.bias"] = torch.randn(width, generator=generator)
    for i in range(depth):
        state |= _block(f"blocks.{i}", width, mlp, generator)
    return state | _norm("norm", width, generator)


def published_mae(
    *, decoder_width: int = 32, decoder_depth: int = 1, grid: tuple[int, int] = (4, 4), **encoder: int
) -> StateDict:
    """A MAE checkpoint with its decoder, as training writes it."""
    state = published_encoder(grid=grid, **encoder)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    width, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    state |= _linear("decoder_embed", width, decoder_width, generator)
    state["mask_token"] = torch.randn(1, 1, decoder_width, generator=generator)
    state["decoder_pos_embed"] = sincos_with_cls(grid, decoder_width)
    for i in range(decoder_depth):
        state |= _block(f"decoder_blocks.{i}", decoder_width, 4, generator)
    state |= _norm("decoder_norm", decoder_width, generator)
    return state | _linear("decoder_pred", decoder_width, patch * patch * in_chans, generator)


def published_classifier(num_classes: int = 5, **encoder: int) -> StateDict:
    """`mae_finetuned_vit_*.pth`: average pooling, then fc_norm, then the head; no norm on tokens."""
    state = published_encoder(learned=True, **encoder)  # type: ignore[arg-type]
    for part in ("weight", "bias"):
        state[f"fc_norm.{part}"] = state.pop(f"norm.{part}")
    return state | _linear(
        "head", state["cls_token"].shape[-1], num_classes, torch.Generator().manual_seed(2)
    )


def plain_tokens(state: StateDict, images: Tensor, num_heads: int, ids_keep: Tensor | None = None) -> Tensor:
    """A ViT's tokens before its last norm, (B, 1 + K, D); all patches without `ids_keep`."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    if ids_keep is not None:
        x = x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]))
    cls = (state["cls_token"] + state["pos_embed"][:, :1]).expand(len(x), -1, -1)
    return _blocks(state, "blocks", torch.cat([cls, x], 1), num_heads)


def plain_mae(
    state: StateDict, images: Tensor, ids_keep: Tensor, num_heads: int, decoder_heads: int
) -> Tensor:
    """MAE's predictions for all patches, (B, N, p p C): restore the order, decode everything."""
    tokens = _normed(state, "norm", plain_tokens(state, images, num_heads, ids_keep))
    tokens = F.linear(tokens, state["decoder_embed.weight"], state["decoder_embed.bias"])
    num_patches = state["pos_embed"].shape[1] - 1
    x = state["mask_token"].repeat(len(images), num_patches, 1)
    for row, ids in enumerate(ids_keep):
        x[row, ids] = tokens[row, 1:]
    x = torch.cat([tokens[:, :1], x], 1) + state["decoder_pos_embed"]
    x = _normed(state, "decoder_norm", _blocks(state, "decoder_blocks", x, decoder_heads))
    return F.linear(x, state["decoder_pred.weight"], state["decoder_pred.bias"])[:, 1:]


def sincos_with_cls(grid: tuple[int, int], width: int) -> Tensor:
    """MAE's table, (1, 1 + N, D), written with loops: the column's half first, the cls token's row zero."""
    table = np.zeros((1, 1 + grid[0] * grid[1], width))
    quarter = width // 4
    omega = 1 / 10000 ** (np.arange(quarter) / quarter)
    for row in range(grid[0]):
        for column in range(grid[1]):
            angles = np.sin(column * omega), np.cos(column * omega), np.sin(row * omega), np.cos(row * omega)
            table[0, 1 + row * grid[1] + column] = np.concatenate(angles)
    return torch.from_numpy(table).float()


def _blocks(state: StateDict, name: str, x: Tensor, num_heads: int) -> Tensor:
    for i in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith(f"{name}."))):
        block = f"{name}.{i}"
        qkv = _applied(state, f"{block}.attn.qkv", _normed(state, f"{block}.norm1", x))
        q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + _applied(state, f"{block}.attn.proj", (attention @ v).transpose(1, 2).flatten(2))
        hidden = F.gelu(_applied(state, f"{block}.mlp.fc1", _normed(state, f"{block}.norm2", x)))
        x = x + _applied(state, f"{block}.mlp.fc2", hidden)
    return x


def _normed(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def _applied(state: StateDict, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def _block(name: str, width: int, mlp: int, generator: torch.Generator) -> StateDict:
    return {
        **_norm(f"{name}.norm1", width, generator),
        **_linear(f"{name}.attn.qkv", width, 3 * width, generator),
        **_linear(f"{name}.attn.proj", width, width, generator),
        **_norm(f"{name}.norm2", width, generator),
        **_linear(f"{name}.mlp.fc1", width, mlp * width, generator),
        **_linear(f"{name}.mlp.fc2", mlp * width, width, generator),
    }


def _linear(name: str, fan_in: int, fan_out: int, generator: torch.Generator) -> StateDict:
    return {
        f"{name}.weight": torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5,
        f"{name}.bias": torch.randn(fan_out, generator=generator) * 0.1,
    }


def _norm(name: str, width: int, generator: torch.Generator) -> StateDict:
    return {
        f"{name}.weight": 1 + torch.randn(width, generator=generator) * 0.1,
        f"{name}.bias": torch.randn(width, generator=generator) * 0.1,
    }
