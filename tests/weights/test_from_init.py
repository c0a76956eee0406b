"""A recipe without `model.name` takes the network of its `init`; runs of it, their cards, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from published_layouts import published_encoder, published_mae
from tiny_runs import TINY

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.export.official import to_huggingface
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import Recipe, load_any
from etpp_ssl.recipe_file import RecipeText
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.plan import plan_run
from etpp_ssl.weights.from_init import with_network_of_init

DECODER = "decoder: {embed_dim: 8, depth: 1, num_heads: 2}"
UNNAMED = TINY[: TINY.index("model:")] + f"model:\n  {DECODER}\n" + TINY[TINY.index("optim:") :]
TINY_DIMS = {"embed_dim": 64, "depth": 1, "num_heads": 1, "patch_size": 4, "num_classes": 0}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    file = tmp_path / "adapt.yaml"
    file.write_text(UNNAMED)
    return file


def loaded(file: Path, *overrides: str) -> Recipe:
    return Recipe.load(file, [f"output={file.parent / 'run'}", *overrides], with_network_of_init)


def dinov3(file: Path, **changes: Any) -> Path:
    net = timm.create_model("vit_small_patch16_dinov3", **{**TINY_DIMS, **changes})
    torch.save(net.state_dict(), file)
    return file


def test_a_run_from_weights_alone_to_timm_and_back(recipe_file: Path, tmp_path: Path) -> None:
    init = dinov3(tmp_path / "dinov3.pth")
    recipe = loaded(recipe_file, f"init={init}", "budget_epochs=0.5")
    assert (recipe.model.name, recipe.model.patch_size) == ("vit_small_patch16_dinov3", 4)
    assert recipe.model.decoder.embed_dim == 8
    assert any("is of family DINOv3, model={name: vit_small_patch16_dinov3" in note for note in recipe.notes)
    assert plan_run(recipe).total_flops > 0
    run = pretrain(recipe)

    folder = export(run.folder.path)
    licence = "those that Meta published are under the DINOv3 License"
    assert licence in " ".join((folder / "README.md").read_text().split()).replace("Those", "those")
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 24)
    with torch.inference_mode():
        assert torch.equal(opened(images), run.bare_model.eval().encoder(images))

    # A run that goes on needs the weights no more; another one starts from this or from its export.
    init.unlink()
    again = loaded(recipe_file, f"init={init}", "budget_epochs=0.5")
    assert again.model == recipe.model
    assert pretrain(again).state.step == run.state.step
    for source in (run.folder.path, folder):
        after = loaded(recipe_file, f"init={source}", f"output={tmp_path / 'after'}", "budget_epochs=0.2")
        assert after.model.given_dims() == recipe.model.given_dims()
        assert licence[:20] in (pretrain(after).recipe.init_licence or "").replace("Those", "those")
        assert RunFolder(tmp_path / "after").any_recipe().init_licence is not None
        shutil.rmtree(tmp_path / "after")


def test_what_the_recipe_says_stands_above_the_weights(recipe_file: Path, tmp_path: Path) -> None:
    torch.save(published_mae(), tmp_path / "mae.pth")
    recipe = loaded(recipe_file, f"init={tmp_path / 'mae.pth'}")
    assert (recipe.model.name, recipe.model.pos_embed) == ("vit", "sincos")
    assert recipe.model.position_grid == (4, 4)
    changed = loaded(recipe_file, f"init={tmp_path / 'mae.pth'}", "model.patch_size=2", "model.num_heads=4")
    assert (changed.model.patch_size, changed.model.num_heads) == (2, 4)
    named = ["model.name=vit_tiny_patch16_224", "model.patch_size=4"]
    assert loaded(recipe_file, f"init={tmp_path / 'mae.pth'}", *named).model.embed_dim is None
    assert loaded(recipe_file, "model.patch_size=8").model.name == "vit_base_patch16_224"
    text = RecipeText.of(UNNAMED, [f"init={tmp_path / 'mae.pth'}"])
    assert with_network_of_init(text, Recipe) is text, "a run's own values"


def test_a_classifier_takes_it_too(recipe_file: Path, tmp_path: Path) -> None:
    dinov3(tmp_path / "dinov3.pth")
    recipe_file.with_name("pretrain.yaml").write_text(UNNAMED)
    text = UNNAMED.replace(DECODER, "drop_path: 0.1") + "task: finetune\n"
    recipe_file.write_text(text.replace("optim: {base_lr: 2e-2}", "optim: {base_lr: 1e-3}"))
    chosen = load_any(recipe_file, [f"init={tmp_path / 'dinov3.pth'}"], with_network_of_init)
    assert (chosen.task, chosen.model.name, chosen.model.depth) == ("finetune", "vit_small_patch16_dinov3", 1)
    assert chosen.model.reg_tokens == 4
    # From a run it takes the image size and the statistics, too.
    pretrained = loaded(
        recipe_file.with_name("pretrain.yaml"), f"init={tmp_path / 'dinov3.pth'}", "in_chans=3"
    )
    pretrained.save(RunFolder(tmp_path / "run").recipe_file)
    after = load_any(recipe_file, [f"init={tmp_path / 'run'}"], with_network_of_init)
    assert any(
        "image_size, in_chans, data.mean and data.std are those of init" in note for note in after.notes
    )
    assert after.model.name == "vit_small_patch16_dinov3"
    # From an export by timm the name alone, of any network.
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text('{"architecture": "resnet18", "model_args": {}}')
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "export" / "pytorch_model.bin")
    resnet = load_any(recipe_file, [f"init={tmp_path / 'export'}"], with_network_of_init)
    assert resnet.model.name == "resnet18"


def fails(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_of_one_network_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    def started(state: Any, *overrides: str) -> Callable[[], Any]:
        torch.save(state, tmp_path / "w.pth")
        return lambda: pretrain(loaded(recipe_file, f"init={tmp_path / 'w.pth'}", *overrides))

    both = {**published_encoder(), **to_huggingface(published_encoder())}
    fails(started(both), r"names of several layouts, those of .*timm \(patch_embed.*transformers' ViT \(emb")
    fails(started({"head.weight": torch.zeros(2, 2)}), r"holds a head \(head\.weight\) and no encoder")
    strange = {**published_encoder(), **{f"blocks.0.adapter.{i}": torch.zeros(2) for i in range(7)}}
    fails(started(strange), r"blocks\.0\.adapter\.0 is not part of the model; .*, and 2 more; the w")
    rotary = "model={name: vit_small_patch16_dinov3, patch_size: 4, embed_dim: 64, depth: 2, num_heads: 1}"
    fails(
        started(published_encoder(), rotary),
        r"absolute positions \(pos_embed\), .* rotary ones alone.*: vit,",
    )
    state = torch.load(dinov3(tmp_path / "w.pth"), weights_only=True)
    named = "model.name=vit_tiny_patch16_224", "model.patch_size=4"
    fails(started(state, *named), r"name: vit_small_patch16_dinov3, patch_size: 4, embed_dim: 64")
    eva02 = timm.create_model("eva02_tiny_patch14_224", **TINY_DIMS, img_size=16).state_dict()
    fails(started(eva02), r"rotary positions, whose kind no tensor tells: give model\.name")


def test_a_patch_of_14_is_told_the_sizes_that_it_divides(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = timm.create_model("vit_small_patch14_dinov2", **{**TINY_DIMS, "patch_size": 14}, img_size=28)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    stages = "curriculum.stages=[{bandwidth: 32, share: 0.5}, {bandwidth: 56, share: 0.5}]"
    plan = ["plan", str(recipe_file), f"init={tmp_path / 'w.pth'}", "output=x"]
    with pytest.raises(SystemExit):
        main([*plan, "image_size=64"])
    message = "model.patch_size 14 does not divide the image height 64 (image_size 64); it divides 56 and 70"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*plan, "image_size=56", stages])
    said = " ".join(capsys.readouterr().out.split())
    assert "bandwidth 32x32 is rounded to 28 (whole patches of 14)" in said
