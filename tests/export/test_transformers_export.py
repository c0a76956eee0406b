"""An export to transformers opens there and gives our features, predictions and loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from etpp_ssl.config import UserError
from etpp_ssl.export.official import export_transformers
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain
from etpp_ssl.weights.official import load_official_mae

SQUARE = ("image_size=24", "curriculum=constant", "budget_epochs=0.3", "model.mask_ratio=0.7")
RECTANGLE = ("curriculum=constant", "budget_epochs=0.3", "model.patch_size=[4, 6]")


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed")


def test_the_names_are_those_of_the_hubs_checkpoints(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe(*SQUARE, "target.norm_pix=false"))
    folder = export_transformers(run.folder.path)
    tensors = load_file(folder / "model.safetensors")
    trained = run.bare_model.state_dict()
    for theirs, ours, rows in (
        ("vit.embeddings.position_embeddings", "encoder.pos_embed", slice(None)),
        (
            "vit.encoder.layer.0.attention.attention.query.weight",
            "encoder.blocks.0.attn.qkv.weight",
            slice(16),
        ),
        (
            "vit.encoder.layer.0.attention.attention.value.bias",
            "encoder.blocks.0.attn.qkv.bias",
            slice(32, 48),
        ),
        ("vit.encoder.layer.0.intermediate.dense.weight", "encoder.blocks.0.mlp.fc1.weight", slice(None)),
        ("vit.layernorm.bias", "encoder.norm.bias", slice(None)),
        ("decoder.decoder_layers.0.output.dense.weight", "decoder.blocks.0.mlp.fc2.weight", slice(None)),
        ("decoder.decoder_pred.bias", "decoder.head.bias", slice(None)),
    ):
        assert torch.equal(tensors[theirs], trained[ours][rows]), theirs
    config = json.loads((folder / "config.json").read_text())
    # Not vit_mae: its AutoModel hides patches at random, in evaluation, too.
    assert config["model_type"] == "vit"
    assert (config["mask_ratio"], config["norm_pix_loss"], config["layer_norm_eps"]) == (0.7, False, 1e-6)


def test_features_predictions_and_loss_agree(
    transformers: Any, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = pretrain(tiny_recipe(*SQUARE))
    folder = export_transformers(run.folder.path)
    theirs, info = opened(transformers.ViTMAEForPreTraining, folder)
    assert not info["missing_keys"]
    assert all("pooler." in key for key in info["unexpected_keys"])
    encoder, info = opened(transformers.ViTModel, folder, add_pooling_layer=False)
    assert not info["missing_keys"]
    assert all(key.startswith("decoder.") or "pooler." in key for key in info["unexpected_keys"])
    ours = run.bare_model.eval()
    images, noise = torch.randn(3, 3, 24, 24), torch.rand(3, 36)
    with torch.inference_mode():
        features = ours.encoder.forward_features(images)
        torch.testing.assert_close(encoder(images).last_hidden_state, features, rtol=0, atol=1e-5)
        out = theirs(images, noise=noise)
        ids_keep = torch.stack([(row == 0).nonzero()[:, 0] for row in out.mask])
        values, ids_removed = ours(images, ids_keep)
        loss = run.task.objective(values, ids_removed, images)
    index = ids_removed[:, :, None].expand(-1, -1, values.shape[-1])
    torch.testing.assert_close(out.logits.gather(1, index), values, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=0)

    # What transformers itself writes is read back to the same bits.
    theirs.save_pretrained(tmp_path / "saved")
    again = load_official_mae(
        tmp_path / "saved" / "model.safetensors", num_heads=2, decoder_num_heads=2, say=lambda line: None
    )
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_obvious_call_gives_our_features(transformers: Any, tiny_recipe: Callable[..., Recipe]) -> None:
    """`AutoModel` and `pipeline`, twice, without any argument: all patches, in order, nothing at random."""
    run = pretrain(tiny_recipe(*SQUARE))
    folder = export_transformers(run.folder.path)
    card = (folder / "README.md").read_text()
    lines = (
        card[card.index("```python\n") + 10 :].split("```")[0].replace("/path/to/this/folder", str(folder))
    )
    copied: dict[str, Any] = {}
    exec(lines, copied)
    images = torch.randn(3, 3, 24, 24)
    with torch.inference_mode():
        ours = run.bare_model.eval().encoder.forward_features(images)
        for _ in range(2):
            found = copied["encoder"](images)
            torch.testing.assert_close(found.last_hidden_state, ours, rtol=0, atol=1e-5)
            assert torch.equal(found.pooler_output, found.last_hidden_state[:, 0])
    _, info = opened(transformers.AutoModel, folder)
    assert not info["missing_keys"]
    assert type(copied["autoencoder"]) is transformers.ViTMAEForPreTraining
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    pixels = copied["processor"](picture, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = run.bare_model.encoder.forward_features(pixels)
    for pool, wanted in ((False, expected), (True, expected[:, 0])):
        extract = transformers.pipeline("image-feature-extraction", model=str(folder), pool=pool)
        torch.testing.assert_close(torch.tensor(extract(picture)), wanted, rtol=0, atol=1e-5)
    assert "hides 70% of the patches at random" in card
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder, num_labels=3)
    assert torch.equal(classifier.vit.embeddings.cls_token, copied["encoder"].embeddings.cls_token)


def test_a_rectangle_opens_as_an_encoder(transformers: Any, tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe(*RECTANGLE, "in_chans=1"))
    said: list[str] = []
    folder = export_transformers(run.folder.path, say=said.append)
    assert said == [
        "the decoder is left out, and the folder is one of ViTModel alone: "
        "it is for squares only, not for 4x4 patches of 4x6 px"
    ]
    encoder, info = opened(transformers.AutoModel, folder)
    assert type(encoder) is transformers.ViTModel
    assert not any(info.values())
    card = (folder / "README.md").read_text()
    assert "Leave `interpolate_pos_encoding` off" in card
    assert "ViTMAEForPreTraining" not in card
    images = torch.randn(3, 1, 16, 24)
    with torch.inference_mode():
        features = run.bare_model.eval().encoder.forward_features(images)
        torch.testing.assert_close(encoder(images).last_hidden_state, features, rtol=0, atol=1e-5)


def test_the_processor_gives_the_runs_size_and_statistics(
    transformers: Any, tiny_recipe: Callable[..., Recipe]
) -> None:
    run = pretrain(tiny_recipe(*RECTANGLE))
    processor = transformers.AutoImageProcessor.from_pretrained(export_transformers(run.folder.path))
    pixels = processor(Image.new("RGB", (50, 40), (255, 0, 51)), return_tensors="pt")["pixel_values"]
    mean, std = run.recipe.data.statistics(3)
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(mean)) / torch.tensor(std)
    assert pixels.shape == (1, 3, 16, 24)
    torch.testing.assert_close(pixels[0].mean((1, 2)), expected, rtol=0, atol=1e-5)


def test_what_it_has_no_place_for_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe(*SQUARE, "model.reg_tokens=1"))
    with pytest.raises(
        UserError, match="format transformers holds MAE's encoder only: no place for reg_token"
    ):
        export_transformers(run.folder.path)
    assert not (run.folder.path / "export").exists()


def opened(model_class: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model in eval mode, and what its tensors did not match."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    return model.eval(), info
