"""An export opens in stock timm, in an interpreter without us, with our features to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import TINY

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import pooled_features
from etpp_ssl.export.card import final_norm
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

ELSEWHERE = """
import sys
import timm, torch
from PIL import Image
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    images = load_file(folder + "/../images.safetensors")["images"]
    with torch.inference_mode():
        features = model(images)
    config = timm.data.resolve_data_config({}, model=model)
    print(tuple(config["mean"]), tuple(config["std"]), end=" ")
    print(tuple(config["input_size"]), config["crop_pct"], config["interpolation"])
    save_file({"features": features.contiguous()}, folder + "/../features.safetensors")
assert "etpp_ssl" not in sys.modules
"""

CASES = {
    "rgb": ([], None),
    "average pool of a cls encoder": ([], "avg"),
    "one channel": (["in_chans=1"], None),
    "five channels": (["in_chans=5", "data.mean=[0.1, 0.2, 0.3, 0.4, 0.5]"], None),
    "no cls token": (["model.class_token=false"], None),
    "registers": (["model.reg_tokens=3"], None),
    "registers only": (["model.class_token=false", "model.reg_tokens=2"], None),
    "learned positions": (["model.pos_embed=learned"], None),
}


class Exported(NamedTuple):
    """A run, what its export gives in stock timm, and what it gives here."""

    folder: Path
    recipe: Recipe
    theirs: torch.Tensor
    printed: str
    ours: torch.Tensor


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All `CASES`, opened by one other interpreter."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folders, recipes, ours = [], [], []
    for number, (overrides, pool) in enumerate(CASES.values()):
        recipe = Recipe.parse(TINY, [f"output={elsewhere / str(number)}", "budget_epochs=0.3", *overrides])
        run = pretrain(recipe)
        folder = export(run.folder.path, pool=pool)
        assert folder == run.folder.path / "export" / "timm"
        images = torch.randn(3, recipe.in_chans, *recipe.size, generator=torch.Generator().manual_seed(0))
        save_file({"images": images}, folder.parent / "images.safetensors")
        with torch.inference_mode():
            ours.append(pooled_features(run.bare_model.eval().encoder, images, pool))
        folders.append(folder)
        recipes.append(recipe)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        cwd=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = [load_file(folder.parent / "features.safetensors")["features"] for folder in folders]
    found = zip(folders, recipes, theirs, done.stdout.splitlines(), ours, strict=True)
    return {name: Exported(*values) for name, values in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_timm_gives_our_features_to_the_last_bit(case: str, exported: dict[str, Exported]) -> None:
    _, recipe, theirs, printed, ours = exported[case]
    assert torch.equal(theirs, ours)
    mean, std = recipe.data.statistics(recipe.in_chans)
    expected = (mean, std, (recipe.in_chans, 16, 24), 0.875, "bicubic")
    assert printed.strip() == " ".join(str(value) for value in expected)


def test_timms_rule_for_channels_is_kept_off_weights_that_it_is_not_for(
    exported: dict[str, Exported],
) -> None:
    """timm 1.0.21 to 1.0.30 give a first convolution of five channels random values, and log a warning."""
    for name, wanted in (
        ("rgb", "patch_embed.proj"),
        ("one channel", "patch_embed.proj"),
        ("five channels", None),
    ):
        config = json.loads((exported[name].folder / "config.json").read_text())
        assert config["pretrained_cfg"]["first_conv"] == wanted, name


def test_transformers_opens_it_and_gives_the_same_bits(exported: dict[str, Exported]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from PIL import Image

    for name, export_ in exported.items():
        folder, images = (
            str(export_.folder),
            load_file(export_.folder.parent / "images.safetensors")["images"],
        )
        model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), name
        with torch.inference_mode():
            assert torch.equal(model.eval()(images).pooler_output, export_.theirs), name
        if export_.recipe.in_chans == 3:
            processor = transformers.AutoImageProcessor.from_pretrained(folder)
            picture = Image.effect_noise((50, 40), 90).convert("RGB")
            pixels = processor(picture, return_tensors="pt")["pixel_values"]
            features = transformers.pipeline("image-feature-extraction", model=folder)(picture)
            with torch.inference_mode():
                expected = model(pixels).last_hidden_state
            torch.testing.assert_close(torch.tensor(features), expected, rtol=0, atol=1e-5)


def test_a_named_model_exports_under_its_name_with_trained_weights(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    named = "model={name: vit_tiny_patch16_224, depth: 1, decoder: {embed_dim: 8, depth: 1, num_heads: 2}}"
    run = pretrain(tiny_recipe(named, "image_size=[32, 48]", "curriculum=constant", "budget_epochs=0.3"))
    folder = export(run.folder.path, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    exported = load_file(folder / "model.safetensors")
    trained = run.folder.checkpoints()[0].model()
    assert exported.keys() == {k.removeprefix("encoder.") for k in trained if k.startswith("encoder.")}
    assert all(torch.equal(value, trained[f"encoder.{name}"]) for name, value in exported.items())


def test_the_card_says_what_it_is_and_how_to_load_it(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe("budget_epochs=0.3", "data.description=Shapes we drew."))
    folder = export(run.folder.path, license_name="apache-2.0")
    card = (folder / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["pipeline_tag"] == "image-feature-extraction"
    for words in ("Shapes we drew.", "pretrained=True", "budget_epochs: 0.3", "(1, 16)", "`AutoModel.from_"):
        assert words in body


def test_the_card_has_the_probes_results_and_no_place_of_this_machine(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (24, 16), (20 * number, 90, 200)).save(tmp_path / "images" / f"{number}.png")
    data = f"data={{name: folder, root: {tmp_path / 'images'}, num_workers: 0, holdout: 4}}"
    run = pretrain(tiny_recipe(data, "probe=reconstruction"))
    loss = run.folder.metrics()[-1]["heldout_loss"]
    row = {"step": run.state.step, "protocol": {"name": "knn"}, "knn_top1": 12.5}
    unseen = {"root": "/a/b", "split": "eval", "holdout": 0, "num_images": 8, "fingerprint": "f"}
    unseen["trained_on"] = 0
    seen = {**unseen, "split": "train", "trained_on": 8}
    rows = ({**row, "data": seen, "knn_top1": 99.5}, {**row, "data": unseen}, {**row, "step": 1})
    run.folder.probes_file.parent.mkdir()
    run.folder.probes_file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    card = (export(run.folder.path) / "README.md").read_text()
    assert f"| heldout_loss | {loss:.6g} |" in card
    how = f"step {run.state.step}, name knn, on 8 images of b, split eval, fingerprint f"
    assert f"Measured at {how}." in card
    assert card.count("knn_top1") == 1
    assert "99.5" not in card
    assert str(tmp_path) not in card
    assert "root: images" in card


def test_the_command_prints_the_line_that_loads_it(
    tiny_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tiny_recipe("budget_epochs=0.3"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.folder.path)])
    assert not ended.value.code
    line = capsys.readouterr().err.splitlines()[-1]
    model = eval(line.removeprefix("in Python: "), {"timm": timm})
    assert torch.equal(model.state_dict()["pos_embed"], run.bare_model.encoder.state_dict()["pos_embed"])


def test_exporting_again_replaces_and_other_folders_are_left_alone(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = pretrain(tiny_recipe("budget_epochs=0.3"))
    folder = export(run.folder.path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    export(run.folder.path)
    assert load_file(folder / "model.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not an earlier result"):
        export(run.folder.path, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_what_is_no_run_or_has_no_checkpoint_is_refused(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="does not exist"):
        export(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no recipe\.yaml"):
        export(tmp_path)
    tiny_recipe().save(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="no checkpoint yet"):
        export(tmp_path)
    assert not (tmp_path / "export").exists()
    assert RunFolder(tmp_path).metrics() == []


def test_the_card_says_where_the_final_norm_comes_from(tiny_recipe: Callable[..., Recipe]) -> None:
    cross = "model.decoder=cross"

    def of(recipe: Recipe) -> str:
        return final_norm(recipe.model.decoder.reads_blocks, recipe.init)

    assert "was trained with it" in of(tiny_recipe())
    assert "was trained with it" in of(tiny_recipe(cross, "model.decoder.reads=output"))
    assert "not trained (weight 1 and bias 0)" in of(tiny_recipe(cross))
    assert "not trained (as it was in `init: runs/a`)" in of(tiny_recipe(cross, "init=runs/a"))
