"""A run as a checkpoint of the original MAE code: `{"model": state_dict}`, decoder included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from etpp_ssl.config import UserError, show_size
from etpp_ssl.export.card import model_card
from etpp_ssl.export.folder import (
    CARD_FILE,
    Target,
    TrainedModel,
    contiguous,
    decoder_sizes,
    export_folder,
    image_size,
    in_chans,
    is_square,
    reason_without_decoder,
    require_plain_encoder,
)
from etpp_ssl.files import replaced
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.weights.layouts import official_names

CHECKPOINT_FILE = "model.pth"
LOAD = """With models_mae.py of https://github.com/facebookresearch/mae:

```python
import functools

import models_mae
import torch

model = {original}
checkpoint = torch.load("/path/to/this/folder/model.pth", map_location="cpu", weights_only=True)
model.load_state_dict(checkpoint["model"], strict={strict})
```"""


def export(
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
    trained = TrainedModel.read(run_dir, "mae", say)
    folder = export_folder(trained.run, out, "mae", CHECKPOINT_FILE)
    model = trained.model
    require_plain_encoder(model, "mae")
    if not is_square(model):
        raise UserError(
            f"the format mae is for square images and patches, not for image_size "
            f"{show_size(image_size(model))} with patches of {show_size(model.patch_size)} px; use --to timm"
        )
    reason = reason_without_decoder(model, trained.target)
    if reason is None and _mlp_width(model) != 4 * model.encoder.embed_dim:
        reason = "the original has one model.mlp_ratio for encoder and decoder, and its decoder's is 4"
    if reason is not None:
        say(f"the decoder is left out: {reason}")
    card = model_card(
        trained.run,
        trained.checkpoint,
        license_name,
        library="pytorch",
        contents="It holds encoder and decoder." if reason is None else "It holds the encoder alone.",
        load=LOAD.format(original=_original(model, trained.target), strict=reason is None),
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
