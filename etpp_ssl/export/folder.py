"""What every export does: read the run's newest weights, and find the folder to write.

Whether a fixed format of others has a place for a model: they know plain ViTs and MAE's decoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.model.decoders import MAEDecoder
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.targets.combined import CombinedConfig
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.weights.loading import load_trained

CARD_FILE = "README.md"


@dataclass(frozen=True)
class TrainedModel:
    """A run's model with the weights of its newest whole checkpoint."""

    run: RunFolder
    recipe: Recipe
    step: int
    model: MaskedAutoencoder

    @classmethod
    def read(cls, run_dir: str | Path, say: Callable[[str], None]) -> TrainedModel:
        """Read it, on the CPU.

        Args:
            run_dir: the run.
            say: told of damaged checkpoints that are passed over.

        Raises:
            UserError: if there is no run or no checkpoint.
        """
        run = RunFolder(run_dir)
        recipe = run.recipe()
        checkpoint = run.trained(say)
        with torch.random.fork_rng(devices=[]):
            model = recipe.build_model()
        load_trained(model, checkpoint)
        return cls(run, recipe, checkpoint.step, model)


def export_folder(run: RunFolder, out: str | Path | None, target: str, marker: str) -> Path:
    """The folder to write: `out`, or `RUN/export/<target>`.

    Args:
        run: the run.
        out: chosen by the user, or None.
        target: the format.
        marker: the file that shows that a folder is an earlier export of it.

    Raises:
        UserError: if it is no folder, or holds something else.
    """
    # With a name of its own, which `.` has not.
    folder = Path(os.path.abspath(out)) if out is not None else run.path / "export" / target
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; choose another name")
    if folder.exists() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds something that is no export; choose another folder")
    return folder


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them: each with memory of its own, in order."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


LAYER_NORM_EPS = 1e-6
_OF_A_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def require_plain_encoder(model: MaskedAutoencoder, target: str) -> None:
    """Refuse an encoder that is not MAE's: cls token, GELU, biases everywhere, norms of eps 1e-6.

    Args:
        model: the model.
        target: the format, for the message.

    Raises:
        UserError: naming up to five tensors without a place or missing, or what else is different.
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


def pixels_predicted(recipe: Recipe) -> PixelsConfig | None:
    """The target if it is pixels, maybe as the only part of a sum, otherwise None."""
    target = recipe.target
    if isinstance(target, CombinedConfig) and len(target.parts) == 1:
        (part,) = target.parts
        return part if isinstance(part, PixelsConfig) else None
    return target if isinstance(target, PixelsConfig) else None


def reason_without_decoder(model: MaskedAutoencoder, recipe: Recipe) -> str | None:
    """Why the decoder has no place beside the encoder, or None if it has one.

    Args:
        model: the model.
        recipe: the run's, whose target is what the decoder predicts.
    """
    if type(model.decoder) is not MAEDecoder:
        return f"a {type(model.decoder).__name__} is not MAE's"
    if pixels_predicted(recipe) is None:
        pixels = math.prod(model.patch_size) * recipe.in_chans
        values = model.decoder.head.out_features
        return f"it predicts {values} values per patch (target {recipe.target.name}), not the {pixels} pixels"
    if not is_square(model):
        grid: tuple[int, int] = tuple(model.encoder.patch_embed.grid_size)
        return (
            f"it is for squares only, not for {grid[0]}x{grid[1]} patches of {show_size(model.patch_size)} px"
        )
    return None
