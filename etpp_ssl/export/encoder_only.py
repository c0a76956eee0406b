"""A run's encoder as transformers' `DINOv3ViTModel` or `PixioModel`, where it is one, without the decoder.

Written without importing transformers, under the names of its files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, listed, show_size
from etpp_ssl.export.card import model_card
from etpp_ssl.export.folder import (
    CARD_FILE,
    LAYER_NORM_EPS,
    contiguous,
    image_size,
    in_chans,
    is_square,
    read_autoencoder,
)
from etpp_ssl.export.official import MARKER, processor_config, to_huggingface
from etpp_ssl.files import replaced, save_tensors, write_json
from etpp_ssl.model.encoders import encoder_of
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.run_folder import MODEL_FILE
from etpp_ssl.weights.names import THIRDS

LOAD = """```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("/path/to/this/folder")
encoder = AutoModel.from_pretrained("/path/to/this/folder")  # {model}
```

`last_hidden_state` is {tokens} and all patches behind the final norm. The processor resizes whole pictures to
{size} px; the run's own evaluation resizes to cover and takes the centre crop."""


@dataclass(frozen=True)
class Format:
    """A model of transformers that holds an encoder."""

    name: str
    """What stands behind `--to`."""
    model: str
    """transformers' class."""
    tokens: str
    """Its tokens in front of the patches, in words."""
    refusal: Callable[[Any], str | None]
    """Why it cannot hold a network, or None."""
    tensors: Callable[[Any], dict[str, Tensor]]
    """The network's tensors under its names."""
    config: Callable[[Any], dict[str, Any]]
    """What its `config.json` says beside the sizes that all have."""


def export(
    target: Format,
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    license_name: str = "other",
    say: Callable[[str], None] = print,
) -> Path:
    """Write `model.safetensors`, `config.json`, `preprocessor_config.json` and a model card.

    Args:
        target: `DINOV3` or `PIXIO`.
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/<format>`. An earlier export there is replaced.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run or no checkpoint, `out` holds something else, or the encoder is another.
    """

    def check(model: MaskedAutoencoder, name: str) -> None:
        reason = target.refusal(model.encoder)
        if reason is None and not is_square(model):
            reason = (
                f"image_size {show_size(image_size(model))} with patches of {show_size(model.patch_size)} px"
            )
        if reason is not None:
            raise UserError(f"the format {name} holds a {target.model} only: {reason}; use --to timm")

    run, recipe, trained, model, folder = read_autoencoder(run_dir, out, target.name, MARKER, say, check)
    net, size = model.encoder, image_size(model)
    tensors = target.tensors(net)
    config = {
        "architectures": [target.model],
        "hidden_size": net.embed_dim,
        "num_hidden_layers": len(net.blocks),
        "num_attention_heads": encoder_of(net).num_heads,
        "hidden_act": "gelu",
        "image_size": size[0],
        "patch_size": model.patch_size[0],
        "num_channels": in_chans(model),
        "torch_dtype": "float32",
        **target.config(net),
    }
    card = model_card(
        run,
        trained,
        license_name,
        library="transformers",
        contents="It holds the encoder alone.",
        load=LOAD.format(model=target.model, tokens=target.tokens, size=show_size(size)),
    )
    with replaced(folder) as aside:
        save_tensors(contiguous(tensors), aside / MODEL_FILE, {"format": "pt"})
        write_json(aside / MARKER, config)
        processor = processor_config(
            size, *recipe.data.statistics(recipe.in_chans), recipe.data.reading(recipe.in_chans)
        )
        write_json(aside / "preprocessor_config.json", processor)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


_TO_DINOV3 = (
    (r"^(cls_token)$", r"embeddings.\1"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
    (r"^norm\.", "norm."),
    (r"^blocks\.(\d+)\.(norm[12])\.", r"layer.\1.\2."),
    (r"^blocks\.(\d+)\.gamma_([12])$", r"layer.\1.layer_scale\2.lambda1"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layer.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.([qv])_bias$", r"layer.\1.attention.\2_proj.bias"),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"layer.\1.mlp.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1_g\.", r"layer.\1.mlp.gate_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1_x\.", r"layer.\1.mlp.up_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"layer.\1.mlp.down_proj."),
)
_QKV = re.compile(r"^blocks\.(\d+)\.attn\.qkv\.weight$")
_DINOV3_EPS, _DINOV3_TEMPERATURE = 1e-5, 100.0


def _dinov3_refusal(net: Any) -> str | None:
    rope = type(getattr(net, "rope", None)).__name__
    if rope != "RotaryEmbeddingDinoV3" or net.rope.temperature != _DINOV3_TEMPERATURE:
        return f"this is a {type(net).__name__} with other positions"
    names = set(net.state_dict())
    strange = [name for name in names if not _QKV.match(name) and _dinov3_name(name) is None]
    strange += {"blocks.0.gamma_1", "cls_token", "norm.weight"} - names
    strange += _other_norms(net, _DINOV3_EPS)
    return f"{listed(sorted(strange))} has no place or is missing" if strange else None


def _other_norms(net: Any, eps: float) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, nn.LayerNorm) and m.eps != eps]


def _dinov3_name(name: str) -> str | None:
    return next((re.sub(old, new, name) for old, new in _TO_DINOV3 if re.match(old, name)), None)


def to_dinov3(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's tensors of a DINOv3 in the names of transformers' files; the inverse of its layout's rules.

    Registers and the mask token, which nothing here trains and nothing reads, are there in any case.
    """
    width = state_dict["cls_token"].shape[-1]
    renamed = {"embeddings.mask_token": torch.zeros(1, 1, width)}
    renamed["embeddings.register_tokens"] = torch.zeros(1, 0, width)
    for name, value in state_dict.items():
        block = _QKV.match(name)
        if block is None:
            renamed[_dinov3_name(name) or name] = value
            continue
        for third, part in zip("qkv", value.chunk(3), strict=True):
            renamed[f"layer.{block[1]}.attention.{third}_proj.weight"] = part
    return renamed


def _dinov3_config(net: Any) -> dict[str, Any]:
    mlp, biased = net.blocks[0].mlp, net.blocks[0].attn.q_bias is not None
    gated = hasattr(mlp, "fc1_g")
    return {
        "model_type": "dinov3_vit",
        "num_register_tokens": encoder_of(net).num_registers,
        "intermediate_size": mlp.fc2.in_features,
        "use_gated_mlp": gated,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": _DINOV3_EPS,
        "rope_theta": _DINOV3_TEMPERATURE,
        "query_bias": biased,
        "key_bias": False,
        "value_bias": biased,
    }


def _pixio_refusal(net: Any) -> str | None:
    encoder = encoder_of(net)
    if not encoder.has_class_token or encoder.num_prefix_positions != net.num_prefix_tokens:
        return "this encoder has no class token, or a prefix token without a position"
    strange = [
        *(set(_pixio_tensors(net)) ^ _pixio_names(len(net.blocks))),
        *_other_norms(net, LAYER_NORM_EPS),
    ]
    return f"{listed(sorted(strange))} has no place or is missing" if strange else None


def _pixio_names(depth: int) -> set[str]:
    layers = ["norm1", "norm2", "attention.output.dense", "intermediate.dense", "output.dense"]
    layers += [f"attention.attention.{third}" for third in THIRDS]
    whole = [f"encoder.layer.{i}.{layer}" for i in range(depth) for layer in layers]
    whole += ["embeddings.patch_embeddings.projection", "layernorm"]
    named = {f"{layer}.{part}" for layer in whole for part in ("weight", "bias")}
    return named | {"embeddings.cls_token", "embeddings.position_embeddings"}


def _pixio_tensors(net: Any) -> dict[str, Tensor]:
    tensors = dict(net.state_dict())
    tokens = (tensors["cls_token"], tensors.pop("reg_token", None))
    tensors["cls_token"] = torch.cat([token for token in tokens if token is not None], dim=1)
    renamed = to_huggingface(tensors)
    for theirs, pixios in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        renamed = {name.replace(theirs, pixios): value for name, value in renamed.items()}
    return renamed


def _pixio_config(net: Any) -> dict[str, Any]:
    ratio = net.blocks[0].mlp.fc1.out_features / net.embed_dim
    return {
        "model_type": "pixio",
        "n_cls_tokens": net.num_prefix_tokens,
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "layer_norm_eps": LAYER_NORM_EPS,
        "qkv_bias": True,
    }


DINOV3 = Format(
    "dinov3", "DINOv3ViTModel", "the class token, the registers", _dinov3_refusal,
    lambda net: to_dinov3(net.state_dict()), _dinov3_config,
)  # fmt: skip
PIXIO = Format("pixio", "PixioModel", "the class tokens", _pixio_refusal, _pixio_tensors, _pixio_config)
