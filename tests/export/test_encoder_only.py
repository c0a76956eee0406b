"""An export to DINOv3's or Pixio's class opens in transformers, and gives our features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from etpp_ssl.config import UserError
from etpp_ssl.export.encoder_only import DINOV3, PIXIO, Format, export
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.records import save
from etpp_ssl.weights.architecture import architecture_of
from etpp_ssl.weights.layouts import recognise

SQUARE = ("image_size=16", "curriculum=constant", "budget_epochs=0.3")
EXAMPLES: dict[str, tuple[Format, tuple[str, ...]]] = {
    "dinov3": (DINOV3, ("model.name=vit_small_patch16_dinov3",)),
    "dinov3_plus": (DINOV3, ("model.name=vit_small_plus_patch16_dinov3_qkvb", "model.reg_tokens=0")),
    "pixio": (PIXIO, ("model.reg_tokens=7", "model.pos_embed=learned")),
    "one_class_token": (PIXIO, ()),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_transformers_opens_it_with_our_features(example: str, tiny_recipe: Callable[..., Recipe]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    target, overrides = EXAMPLES[example]
    if not hasattr(transformers, target.model):
        pytest.skip(f"transformers {transformers.__version__} has no {target.model}")
    run = pretrain(tiny_recipe(*SQUARE, *overrides))
    net = run.bare_model.eval().encoder
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save(run)
    folder = export(target, run.folder.path)
    opened, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(opened).__name__ == target.model
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        theirs = opened.eval()(images).last_hidden_state
        torch.testing.assert_close(theirs, net.forward_features(images), rtol=1e-5, atol=1e-5)
    back = recognise(load_file(folder / "model.safetensors"))
    assert {name.removeprefix("encoder.") for name in back.tensors} == set(net.state_dict())
    assert architecture_of(back, "it", num_heads=2).dims["reg_tokens"] == net.num_prefix_tokens - 1


def test_another_encoder_is_refused(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    short = ("curriculum=constant", "budget_epochs=0.1")
    for number, (target, overrides, words) in enumerate(
        (
            (DINOV3, [], "the format dinov3 holds a DINOv3ViTModel only: this is a VisionTransformer"),
            (PIXIO, ["model.class_token=false"], "holds a PixioModel only: this encoder has no class token"),
            (PIXIO, [], "image_size 16x24 with patches of 4 px; use --to timm"),
            (PIXIO, ["model.name=vit_small_patch14_dinov2"], "has no place or is missing"),
        )
    ):
        run = pretrain(tiny_recipe(*short, *overrides, f"output={tmp_path / str(number)}"))
        with pytest.raises(UserError, match=words):
            export(target, run.folder.path)
