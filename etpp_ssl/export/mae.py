"""A run as a checkpoint of the original MAE code: `{"model": state_dict}`, decoder included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from etpp_ssl.config import UserError, show_size
from etpp_ssl.export.card import model_card
from etpp_ssl.export.classifier import refuse_classifier
from etpp_ssl.export.folder import (
    CARD_FILE,
    TrainedModel,
    contiguous,
    export_folder,
    is_square,
    pixels_predicted,
    reason_without_decoder,
    require_plain_encoder,
)
from etpp_ssl.files import replaced
from etpp_ssl.model.decoders import MAEDecoder
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
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

    Fixed positions, the decoder's too, are written as the tables that they are. A decoder that the
    original class has no place for stays behind, with a word; its encoder loads with strict=False.

    Args:
        run_dir: a run with at least one checkpoint; the newest whole one is taken.
        out: the folder to write; by default `RUN/export/mae`. An earlier export there is replaced.
        license_name: for the card, as the Hugging Face hub spells it.
        say: told of damaged checkpoints and of what stays behind.

    Returns:
        The folder.

    Raises:
        UserError: if there is no run, no checkpoint, `out` holds something else, or the encoder is not
            MAE's: a plain ViT with a cls token on square images and patches.
    """
    refuse_classifier(RunFolder(run_dir).any_recipe(), "--to mae")
    trained = TrainedModel.read(run_dir, say)
    folder = export_folder(trained.run, out, "mae", CHECKPOINT_FILE)
    model, recipe = trained.model, trained.recipe
    require_plain_encoder(model, "mae")
    if not is_square(model):
        raise UserError(
            f"the format mae is for square images and patches, not for image_size {show_size(recipe.size)} "
            f"with patches of {show_size(model.patch_size)} px; use --to timm"
        )
    reason = reason_without_decoder(model, recipe)
    if reason is None and _mlp_width(model) != 4 * model.encoder.embed_dim:
        reason = "the original has one model.mlp_ratio for encoder and decoder, and its decoder's is 4"
    if reason is not None:
        say(f"the decoder stays behind: {reason}")
    card = model_card(
        recipe,
        trained.step,
        license_name,
        library="pytorch",
        contents="It holds encoder and decoder." if reason is None else "It holds the encoder alone.",
        load=LOAD.format(original=_original(model, recipe), strict=reason is None),
    )
    with replaced(folder) as aside:
        tensors = contiguous(official_names(model, decoder=reason is None))
        torch.save({"model": tensors}, aside / CHECKPOINT_FILE)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
    return folder


def _mlp_width(model: MaskedAutoencoder) -> int:
    return int(model.encoder.blocks[0].mlp.fc1.out_features)


def _original(model: MaskedAutoencoder, recipe: Recipe) -> str:
    """The call that builds the original's model of this architecture."""
    encoder, decoder = model.encoder, model.decoder
    sizes = {
        "img_size": encoder.patch_embed.img_size[0],
        "patch_size": model.patch_size[0],
        "in_chans": recipe.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.blocks[0].attn.num_heads,
        "mlp_ratio": _mlp_width(model) / encoder.embed_dim,
    }
    pixels = pixels_predicted(recipe)
    if reason_without_decoder(model, recipe) is None:
        assert isinstance(decoder, MAEDecoder)
        assert pixels is not None
        block: Any = decoder.blocks[0]
        sizes |= {
            "decoder_embed_dim": decoder.embed.out_features,
            "decoder_depth": len(decoder.blocks),
            "decoder_num_heads": block.attn.num_heads,
            "norm_pix_loss": pixels.norm_pix,
        }
    arguments = "".join(f"    {key}={value},\n" for key, value in sizes.items())
    norm = "    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),\n"
    return f"models_mae.MaskedAutoencoderViT(\n{arguments}{norm})"
