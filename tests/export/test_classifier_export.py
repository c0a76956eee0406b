"""An exported classifier opens in stock timm, without us, with our logits to the last bit."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file

from etpp_ssl.config import UserError
from etpp_ssl.export.official import export_mae, export_transformers
from etpp_ssl.export.timm import export
from etpp_ssl.model.classifier import Classifier
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.checkpoint import save_checkpoint

ELSEWHERE = """
import json, sys
import timm, torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.inference_mode():
        logits = model(load_file(folder + "/../images.safetensors")["images"])
    save_file({"logits": logits.contiguous()}, folder + "/../logits.safetensors")
    config = timm.data.resolve_data_config({}, model=model)
    names = model.pretrained_cfg["label_names"]
    print(json.dumps([config["input_size"], config["mean"], config["std"], names]))
assert "etpp_ssl" not in sys.modules
"""
CLASSES = ["cat, grey", "dög", "ship"]
SMALL = {
    "resnet": "model={name: resnet18, args: {layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}}",
    "convnext": "model={name: convnext_atto, args: {depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]}}",
    "swin": "model={name: swin_tiny_patch4_window7_224, args: {depths: [1, 1, 1, 1], embed_dim: 12, "
    "num_heads: [1, 2, 2, 4], window_size: 2}}",
    "caformer": "model={name: caformer_s18}",
    "named vit": "model={name: vit_tiny_patch16_224, depth: 1, global_pool: avg}",
}
PYRAMIDS = {
    "pvt_tiny": "model={name: pvt_tiny, args: {depths: [1, 1, 1, 1], embed_dims: [8, 16, 32, 32], "
    "num_heads: [1, 1, 2, 2]}}",
    "cswin_tiny": "model={name: cswin_tiny, args: {depths: [1, 1, 2, 1], embed_dim: 16, "
    "num_heads: [2, 2, 4, 4]}}",
}
CASES = {
    "vit, mean": ["model.global_pool=avg", "in_chans=1"],
    "vit, token": ["model.global_pool=token"],
    "vit, five channels": ["in_chans=5", "data.mean=[0.1, 0.2, 0.3, 0.4, 0.5]"],
    **{
        f"{name}, {chans} channels": [
            small,
            "image_size=[64, 96]",
            "curriculum=constant",
            f"in_chans={chans}",
        ]
        for name, small in SMALL.items()
        # CAFormer has no small form.
        for chans in ((1,) if name == "caformer" else (1, 3))
    },
}
Build = Callable[..., FinetuneRecipe]


def write_run(
    recipe: FinetuneRecipe, *, step: int = 5, average: bool = False
) -> tuple[RunFolder, Classifier]:
    """A run's folder as training leaves it, with random weights; the model that is to be exported."""
    folder = RunFolder(recipe.output)
    folder.path.mkdir(parents=True, exist_ok=True)
    recipe.save(folder.recipe_file)
    torch.manual_seed(0)
    models = [recipe.build_model(len(CLASSES)) for _ in range(2)]
    for model in models:
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                # Nothing stays at 0 or 1, and no variance is negative.
                tensor.add_(0.2 * torch.rand_like(tensor))
    trained, averaged = models
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    tensors = averaged.state_dict() if average else None
    save_checkpoint(folder, step, trained, optimizer, {"classes": CLASSES}, keep=1, average=tensors)
    return folder, (averaged if average else trained).eval()


def test_stock_timm_gives_our_logits_to_the_last_bit(tiny_classifier: Build, tmp_path: Path) -> None:
    folders, ours, recipes = [], [], []
    for index, overrides in enumerate(CASES.values()):
        recipe = tiny_classifier(*overrides, f"output={tmp_path / str(index)}")
        run, model = write_run(recipe, average=index % 2 == 0)
        folder = export(run.path)
        images = torch.randn(2, recipe.in_chans, *recipe.size)
        save_file({"images": images}, folder.parent / "images.safetensors")
        with torch.inference_mode():
            ours.append(model(images))
        folders.append(folder)
        recipes.append(recipe)
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, folders)],
        cwd=tmp_path,
        # Another number of threads adds in another order.
        env={"OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, folder, logits, recipe, line in zip(CASES, folders, ours, recipes, lines, strict=True):
        assert torch.equal(load_file(folder.parent / "logits.safetensors")["logits"], logits), name
        assert logits.shape == (2, 3)
        assert not torch.equal(logits[0], logits[1]), name
        mean, std = recipe.data.statistics(recipe.in_chans)
        assert json.loads(line) == [[recipe.in_chans, *recipe.size], [*mean], [*std], CLASSES], name


def test_transformers_gives_our_logits_and_classes_to_the_last_bit(
    tiny_classifier: Build, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    importlib.import_module("etpp_ssl.model.zoo.pvt")
    cases = {k: v for k, v in CASES.items() if "1 channels" not in k} | {
        "a model that timm lacks": [PYRAMIDS["pvt_tiny"], "image_size=[64, 96]", "curriculum=constant"]
    }
    for index, (name, overrides) in enumerate(cases.items()):
        recipe = tiny_classifier(*overrides, f"output={tmp_path / str(index)}")
        run, ours = write_run(recipe)
        folder = str(export(run.path))
        theirs, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info.values()), name
        images = torch.randn(3, recipe.in_chans, *recipe.size)
        with torch.inference_mode():
            assert torch.equal(theirs.eval()(images).logits, ours(images)), name
        assert list(theirs.config.id2label.values()) == CLASSES, name
        # Features of the backbone are those that timm's head reads.
        features = transformers.AutoModel.from_pretrained(folder).eval()
        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with torch.inference_mode():
            expected = net.forward_head(net.forward_features(images), pre_logits=True)
            assert torch.equal(features(images).pooler_output, expected), name


@pytest.mark.parametrize("name", ["pvt_tiny", "cswin_tiny"])
def test_a_model_that_timm_lacks_says_what_to_import(name: str, tiny_classifier: Build) -> None:
    module = f"etpp_ssl.model.zoo.{name.removesuffix('_tiny')}"
    importlib.import_module(module)
    overrides = [PYRAMIDS[name], "image_size=[64, 96]", "curriculum=constant"]
    run, model = write_run(tiny_classifier(*overrides))
    said: list[str] = []
    folder = export(run.path, say=said.append)
    assert [f"`import {module}`" in line for line in said] == [True]
    assert f"\nimport {module} " in (folder / "README.md").read_text()
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(loaded(images), model(images))


def test_the_card_has_classes_and_the_numbers_of_the_exported_step(tiny_classifier: Build) -> None:
    run, _ = write_run(tiny_classifier("init=runs/encoder"))
    card = (export(run.path, license_name="mit") / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["license"] == "mit"
    for words in (
        "fine-tuned from `runs/encoder`",
        "    1 dög",
        "Nothing was measured",
        "budget_epochs: 1.5",
    ):
        assert words in body
    run.metrics_file.write_text('{"step": 4, "top1": 11.5}\n{"step": 5, "top1": 62.5, "top5": null}\n')
    assert "| top-1 (%) | 62.5 |" in (export(run.path) / "README.md").read_text()
    run.evaluation_folder.mkdir(parents=True)
    for step, expected in ((4, "62.5"), (5, "70.25")):
        values = {"protocol": {"step": step, "split": "eval"}, "numbers": {"top1": 70.25}}
        (run.evaluation_folder / "evaluation.json").write_text(json.dumps(values))
        assert f"| top-1 (%) | {expected} |" in (export(run.path) / "README.md").read_text()


def test_what_is_for_encoders_is_refused(tiny_classifier: Build) -> None:
    run, _ = write_run(tiny_classifier())
    with pytest.raises(UserError, match="--pool avg is for the encoder"):
        export(run.path, pool="avg")
    for refused, name in ((export_mae, "mae"), (export_transformers, "transformers")):
        with pytest.raises(UserError, match=f"--to {name} is for the encoder"):
            refused(run.path)
    assert not (run.path / "export").exists()
