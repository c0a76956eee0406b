"""A run as others' formats: a checkpoint of the original MAE code, or a folder of Hugging Face transformers.

The first is `{"model": state_dict}`, decoder included; the second is written without importing transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.export.card import model_card
from etpp_ssl.export.folder import (
    CARD_FILE,
    LAYER_NORM_EPS,
    Target,
    contiguous,
    decoder_sizes,
    image_size,
    in_chans,
    is_square,
    read_autoencoder,
    reason_without_decoder,
)
from etpp_ssl.files import replaced, save_tensors, write_json
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.run_folder import MODEL_FILE
from etpp_ssl.weights.layouts import DECODER_NAMES
from etpp_ssl.weights.names import LAYER_NAMES, NAMES, THIRDS

CHECKPOINT_FILE = "model.pth"
LOAD_MAE = """With models_mae.py of https://github.com/facebookresearch/mae:

```python
import functools

import models_mae
import torch

model = {original}
checkpoint = torch.load("/path/to/this/folder/model.pth", map_location="cpu", weights_only=True)
model.load_state_dict(checkpoint["model"], strict={strict})
```"""


def export_mae(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    license_name: str = "other",
    say: Callable[[str], None] = print,
) -> Path:
    """Write `model.pth`, which the original's `MaskedAutoencoderViT` loads with strict=True, and a card.

    Fixed positions of encoder and decoder are written as tables. A decoder that the original class cannot
    hold is left out, and `say` is told; the encoder then loads with strict=False.

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/mae`. An earlier export there is replaced.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints and of what is left out.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run or no checkpoint, `out` holds something else, or the encoder is not
            MAE's: a plain ViT with a cls token on square images and patches.
    """
    run, recipe, trained, model, folder = read_autoencoder(run_dir, out, "mae", CHECKPOINT_FILE, say)
    if not is_square(model):
        raise UserError(
            f"the format mae is for square images and patches, not for image_size "
            f"{show_size(image_size(model))} with patches of {show_size(model.patch_size)} px; use --to timm"
        )
    reason = reason_without_decoder(model, recipe.target)
    if reason is None and _mlp_width(model) != 4 * model.encoder.embed_dim:
        reason = "the original has one model.mlp_ratio for encoder and decoder, and its decoder's is 4"
    if reason is not None:
        say(f"the decoder is left out: {reason}")
    card = model_card(
        run,
        trained,
        license_name,
        library="pytorch",
        contents="It holds encoder and decoder." if reason is None else "It holds the encoder alone.",
        load=LOAD_MAE.format(original=_original(model, recipe.target), strict=reason is None),
    )
    with replaced(folder) as aside:
        tensors = contiguous(official_names(model, decoder=reason is None))
        torch.save({"model": tensors}, aside / CHECKPOINT_FILE)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def _mlp_width(model: MaskedAutoencoder) -> int:
    return int(model.encoder.blocks[0].mlp.fc1.out_features)


def _original(model: MaskedAutoencoder, target: Target) -> str:
    """The call that builds the original's model of this architecture."""
    encoder = model.encoder
    sizes = {
        "img_size": image_size(model)[0],
        "patch_size": model.patch_size[0],
        "in_chans": in_chans(model),
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.blocks[0].attn.num_heads,
        "mlp_ratio": _mlp_width(model) / encoder.embed_dim,
    }
    if reason_without_decoder(model, target) is None:
        width, depth, num_heads, _, norm_pix = decoder_sizes(model, target)
        sizes |= {
            "decoder_embed_dim": width,
            "decoder_depth": depth,
            "decoder_num_heads": num_heads,
            "norm_pix_loss": norm_pix,
        }
    arguments = "".join(f"    {key}={value},\n" for key, value in sizes.items())
    norm = "    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),\n"
    return f"models_mae.MaskedAutoencoderViT(\n{arguments}{norm})"


MARKER = "config.json"
BICUBIC = 3
"""PIL's number of the filter, for image processors."""
LOAD_TRANSFORMERS = """```python
from transformers import {classes}

processor = AutoImageProcessor.from_pretrained("/path/to/this/folder")
{models}```

`AutoModel` (or `ViTModel`) gives features: `last_hidden_state` is the class token and all patches behind the
final norm, and `pooler_output` is the class token again (the pooler is the identity, `pooler_act` linear; a
release of transformers that does not know this key puts a tanh on it).{whole}

The processor resizes whole pictures to {size} px; the run's own evaluation resizes to cover and takes the
centre crop.{rectangle}"""
OF_THE_WHOLE = """

`ViTMAEForPreTraining` gives reconstructions. It hides {ratio:.0%} of the patches at random, in evaluation,
too, so take no features from it. What either of them leaves in the file is listed as unexpected keys."""
OF_A_RECTANGLE = """ Leave `interpolate_pos_encoding` off: transformers takes
all positions for those of a square, and tells only where their number is not a square's."""


def export_transformers(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    license_name: str = "other",
    say: Callable[[str], None] = print,
) -> Path:
    """Write `model.safetensors`, `config.json`, `preprocessor_config.json` and a model card.

    The folder is one of a ViT: `AutoModel`, `ViTModel` and `pipeline("image-feature-extraction")` give the
    encoder's features, with the class token as `pooler_output`. `ViTMAEForPreTraining.from_pretrained` opens
    the same folder with the decoder, unless ViTMAE cannot hold it. (A folder of type `vit_mae` would have
    `AutoModel` hide patches at random in evaluation, too.)

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/transformers`. An earlier export there is
            replaced.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints and of what is left out.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run or no checkpoint, `out` holds something else, or the encoder is not a
            plain ViT with a cls token.
    """
    run, recipe, trained, model, folder = read_autoencoder(run_dir, out, "transformers", MARKER, say)
    target = recipe.target
    reason = reason_without_decoder(model, target)
    if reason is not None:
        say(f"the decoder is left out, and the folder is one of ViTModel alone: {reason}")
    whole = reason is None
    models = 'encoder = AutoModel.from_pretrained("/path/to/this/folder")\n'
    if whole:
        models += 'autoencoder = ViTMAEForPreTraining.from_pretrained("/path/to/this/folder")\n'
    card = model_card(
        run,
        trained,
        license_name,
        library="transformers",
        contents="It holds encoder and decoder." if whole else "It holds the encoder alone.",
        load=LOAD_TRANSFORMERS.format(
            classes="AutoImageProcessor, AutoModel" + (", ViTMAEForPreTraining" if whole else ""),
            models=models,
            size=show_size(image_size(model)),
            whole=OF_THE_WHOLE.format(ratio=model.mask_ratio) if whole else "",
            rectangle="" if is_square(model) else OF_A_RECTANGLE,
        ),
    )
    with replaced(folder) as aside:
        tensors = to_huggingface(official_names(model, decoder=whole))
        width = model.encoder.embed_dim
        # Without one in the file, transformers would initialise a pooler at random.
        pooler = {"weight": torch.eye(width), "bias": torch.zeros(width)}
        tensors |= {f"{'vit.' if whole else ''}pooler.dense.{part}": value for part, value in pooler.items()}
        save_tensors(contiguous(tensors), aside / MODEL_FILE, {"format": "pt"})
        decoder = decoder_config(model, target) if whole else {}
        write_json(aside / MARKER, {**encoder_config(model), **decoder})
        reading = recipe.data.reading(recipe.in_chans)
        statistics = recipe.data.statistics(recipe.in_chans)
        processor = processor_config(image_size(model), *statistics, reading)
        write_json(aside / "preprocessor_config.json", processor)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def encoder_config(model: MaskedAutoencoder) -> dict[str, Any]:
    """The `config.json` of a `ViTModel` whose pooler is the identity."""
    block = model.encoder.blocks[0]
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": model.encoder.embed_dim,
        "num_hidden_layers": len(model.encoder.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": _one_or_two(image_size(model)),
        "patch_size": _one_or_two(model.patch_size),
        "num_channels": in_chans(model),
        "qkv_bias": True,
        "pooler_act": "linear",
        "torch_dtype": "float32",
    }


def decoder_config(model: MaskedAutoencoder, target: Target) -> dict[str, Any]:
    """What `ViTMAEForPreTraining` reads in the `config.json`, too; the target is pixels."""
    width, depth, num_heads, mlp_width, norm_pix = decoder_sizes(model, target)
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": depth,
        "decoder_num_attention_heads": num_heads,
        "decoder_intermediate_size": mlp_width,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": norm_pix,
    }


def processor_config(
    size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], reading: Reading
) -> dict[str, Any]:
    """The `preprocessor_config.json` of images of (H, W) pixels, with statistics of their channels.

    Under `data.range` they are statistics of the raw values, which transformers normalises by in one step;
    `values` keeps ours beside them.
    """
    values: dict[str, Any] = {}
    scale = {"do_rescale": True, "rescale_factor": 1 / 255}
    if reading.deep:
        values = {"values": {**reading.settings(), "mean": list(mean), "std": list(std)}}
        scale = {"do_rescale": False}
        low, high = reading.bounds()
        mean = tuple((low + np.array(mean) * (high - low)).tolist())
        std = tuple((np.array(std) * (high - low)).tolist())
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": BICUBIC,
        **scale,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        **values,
    }


def _one_or_two(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def official_names(model: MaskedAutoencoder, *, decoder: bool = True) -> dict[str, Tensor]:
    """A model's state dict in MAE's layout, with its decoder's fixed positions.

    Args:
        model: with an `MAEDecoder`, unless `decoder` is False.
        decoder: include the decoder.

    Returns:
        The encoder's tensors under timm's names, and the decoder's under MAE's with
        `decoder_pos_embed` (1, 1 + N, E), the cls token's row zero.
    """
    tensors = dict(model.encoder.state_dict())
    if not decoder:
        return tensors
    official = {ours: theirs for theirs, ours in DECODER_NAMES.items()}
    for name, value in model.decoder.state_dict().items():
        first, dot, rest = name.partition(".")
        tensors[f"{official[f'decoder.{first}']}{dot}{rest}"] = value
    grid: tuple[int, int] = tuple(model.encoder.patch_embed.grid_size)
    width = model.decoder.mask_token.shape[-1]
    table = sincos_pos_embed(grid, model.position_grid, width)
    prefix = torch.zeros(model.encoder.num_prefix_tokens, width)
    tensors["decoder_pos_embed"] = torch.cat([prefix, table])[None]
    return tensors


def to_huggingface(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in MAE's names (see `official_names`) in those of Hugging Face.

    With a decoder they are those of `ViTMAEForPreTraining`, without one those of `ViTModel`.
    """
    vit = "vit." if "decoder_embed.weight" in official else ""
    renamed: dict[str, Tensor] = {}
    for name, value in official.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            new = f"{vit}{NAMES[name]}" if name in NAMES else f"decoder.{name}"
            renamed[new] = value
            continue
        decoder, number, layer, part = block.groups()
        prefix = f"decoder.decoder_layers.{number}" if decoder else f"{vit}encoder.layer.{number}"
        if layer == "attn.qkv":
            # timm keeps the three in one tensor.
            for third, values in zip(THIRDS, value.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{third}.{part}"] = values
        else:
            renamed[f"{prefix}.{LAYER_NAMES[layer]}.{part}"] = value
    return renamed
