"""What every export shares: the run's newest weights, the folder to write, and what other formats hold.

The formats of MAE and transformers hold a plain ViT and MAE's decoder; timm's holds any network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.files import check_place
from etpp_ssl.model.decoders import MAEDecoder
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.targets.combined import CombinedConfig
from etpp_ssl.targets.hog import HogConfig
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.weights.loading import load_trained

CARD_FILE = "README.md"
LAYER_NORM_EPS = 1e-6
_OF_A_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")

Target = PixelsConfig | HogConfig | CombinedConfig


def read_autoencoder(
    run_dir: str | Path,
    out: str | Path | None,
    target: str,
    marker: str,
    say: Callable[[str], None],
    check: Callable[[MaskedAutoencoder, str], None] | None = None,
) -> tuple[RunFolder, Recipe, Checkpoint, MaskedAutoencoder, Path]:
    """A run, its recipe, its newest whole checkpoint, the model with its weights on the CPU, and the place.

    Args:
        run_dir: the run.
        out, target, marker: see `export_folder`.
        say: told of damaged checkpoints that are passed over.
        check: refuses what the format cannot hold; None refuses what is not MAE's encoder.

    Raises:
        UserError: if there is no run or no checkpoint, the run trains a classifier, `out` holds something
            else, or the format cannot hold the encoder.
    """
    run = RunFolder(run_dir)
    recipe = run.any_recipe()
    if isinstance(recipe, FinetuneRecipe):
        raise for_encoders_only(f"--to {target}")
    checkpoint = run.trained(say)
    model = freshly_initialised(recipe.seed, recipe.build_model)
    load_trained(model, checkpoint)
    folder = export_folder(run, out, target, marker)
    (check or _require_plain_encoder)(model, target)
    return run, recipe, checkpoint, model, folder


def for_encoders_only(wanted: str) -> UserError:
    """The refusal of an option or a format that a classifier does not have."""
    return UserError(f"{wanted} is for the encoder of a pre-training run; export a classifier by --to timm")


def export_folder(run: RunFolder, out: str | Path | None, target: str, marker: str) -> Path:
    """The folder to write: `out`, or `RUN/export/<target>`.

    Args:
        run: the run.
        out: chosen by the user, or None.
        target: the format.
        marker: the file by which an earlier export is recognised.

    Raises:
        UserError: as `check_place`.
    """
    return check_place(Path(out) if out is not None else run.path / "export" / target, marker)


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors wants them: each contiguous, with memory of its own."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def _require_plain_encoder(model: MaskedAutoencoder, target: str) -> None:
    """Refuse an encoder that is not MAE's: cls token, GELU, biases everywhere, norms of eps 1e-6.

    Args:
        model: the model.
        target: the format, for the message.

    Raises:
        UserError: naming up to five tensors that have no place or are missing, or what else is different.
    """
    encoder = model.encoder
    layers = [f"blocks.{i}.{layer}" for i in range(len(encoder.blocks)) for layer in _OF_A_BLOCK]
    layers += ["patch_embed.proj", "norm"]
    places = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    places |= {"cls_token", "pos_embed"}
    names = set(encoder.state_dict())
    wrong = [f"no place for {name}" for name in sorted(names - places)]
    wrong += [f"{name} is missing" for name in sorted(places - names)]
    wrong += [
        f"{name} is a {type(module).__name__} of another kind"
        for name, module in encoder.named_modules()
        if (isinstance(module, nn.LayerNorm) and module.eps != LAYER_NORM_EPS)
        or (name.endswith("mlp.act") and not (type(module) is nn.GELU and module.approximate == "none"))
    ]
    if wrong:
        raise UserError(f"the format {target} holds MAE's encoder only: {listed(wrong, '; ')}; use --to timm")


def is_square(model: MaskedAutoencoder) -> bool:
    """Whether image grid and patches are square."""
    grid, patch = model.encoder.patch_embed.grid_size, model.patch_size
    return bool(grid[0] == grid[1] and patch[0] == patch[1])


def image_size(model: MaskedAutoencoder) -> tuple[int, int]:
    """(H, W) in pixels at full resolution."""
    height, width = model.encoder.patch_embed.img_size
    return height, width


def in_chans(model: MaskedAutoencoder) -> int:
    """Channels of the images."""
    return int(model.encoder.patch_embed.proj.in_channels)


def pixels_predicted(target: Target) -> PixelsConfig | None:
    """The target if it is pixels, or a sum with pixels as its only part; otherwise None."""
    if isinstance(target, CombinedConfig) and len(target.parts) == 1:
        (part,) = target.parts
        return part if isinstance(part, PixelsConfig) else None
    return target if isinstance(target, PixelsConfig) else None


def reason_without_decoder(model: MaskedAutoencoder, target: Target) -> str | None:
    """Why the formats of others cannot hold the decoder, or None if they can.

    Args:
        model: the model.
        target: what its decoder predicts.
    """
    if type(model.decoder) is not MAEDecoder:
        return f"a {type(model.decoder).__name__} is not MAE's"
    if model.decoder.pos_embed is not None:
        return "its positions are learned, and those of other formats are a fixed table"
    if pixels_predicted(target) is None:
        pixels = math.prod(model.patch_size) * in_chans(model)
        values = model.decoder.head.out_features
        return f"it predicts {values} values per patch (target {target.name}), not the {pixels} pixels"
    if not is_square(model):
        grid: tuple[int, int] = tuple(model.encoder.patch_embed.grid_size)
        return (
            f"it is for squares only, not for {grid[0]}x{grid[1]} patches of {show_size(model.patch_size)} px"
        )
    return None


def decoder_sizes(model: MaskedAutoencoder, target: Target) -> tuple[int, int, int, int, bool]:
    """Of a decoder that other formats can hold: width, depth, heads, MLP width, and `norm_pix_loss`."""
    decoder, pixels = model.decoder, pixels_predicted(target)
    assert isinstance(decoder, MAEDecoder)
    assert pixels is not None
    block: Any = decoder.blocks[0]
    width = decoder.embed.out_features
    return width, len(decoder.blocks), block.attn.num_heads, block.mlp.fc1.out_features, pixels.norm_pix
