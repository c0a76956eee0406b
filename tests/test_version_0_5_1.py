"""Run folders, checkpoints, exports and embeddings that version 0.5.1 wrote still open, and mean the same.

`fixtures/v0_5_1` holds a pre-training run and a classifier's, both stopped at step 6 of 20, with what 0.5.1
exported and embedded of them, and under `finished` the weights that 0.5.1 itself reached at step 20.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from etpp_ssl.cli import main
from etpp_ssl.evaluation.features import read_embeddings
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.weights.loading import load_classifier_init, load_init, load_trained

FIXTURES = Path(__file__).parent / "fixtures" / "v0_5_1"
KINDS = {"pretraining": "pretrain", "classifier": "finetune"}


def etpp(*arguments: object) -> None:
    """Run a command; it must succeed."""
    with pytest.raises(SystemExit) as done:
        main([str(argument) for argument in arguments])
    assert done.value.code == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fixtures, which tests only read and add to."""
    return Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("old") / "runs"))


def images(config: dict[str, Any]) -> torch.Tensor:
    """The run's evaluation images as 0.5.1 cropped them, normalised as an export says; (24, 3, 16, 24)."""
    values = load_file(FIXTURES / "finished" / "eval_images.safetensors")["images"]
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (values / 255 - mean) / std


def stored_features() -> torch.Tensor:
    """Of these images, as 0.5.1 embedded them."""
    return read_embeddings(FIXTURES / "pretraining" / "embeddings" / "eval.safetensors").rows.features


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_of_the_folder_is_printed(kind: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    etpp("plan", runs / kind)
    assert "8x12" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_reaches_the_weights_that_0_5_1_reached(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FIXTURES / kind, tmp_path / "run")
    etpp(KINDS[kind], tmp_path / "run")
    checkpoint = RunFolder(tmp_path / "run").checkpoints()[0]
    assert checkpoint.step == 20
    assert "at step 6" in capsys.readouterr().err
    expected = load_file(FIXTURES / "finished" / f"{kind}.safetensors")
    reached = checkpoint.average() or checkpoint.model()
    assert reached.keys() == expected.keys()
    for name, value in expected.items():
        found = reached[name]
        if name.endswith("attn.qkv.bias"):
            # A key's bias adds the same to all of a query's scores: its gradient is rounding, which Adam
            # takes for a direction, and which other processors round otherwise.
            (q, _, v), (q0, _, v0) = found.chunk(3), value.chunk(3)
            found, value = torch.cat([q, v]), torch.cat([q0, v0])
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6, msg=name)


def test_an_exported_encoder_gives_the_stored_features(runs: Path) -> None:
    net = timm.create_model(f"local-dir:{runs / 'pretraining' / 'export' / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        features = net(images(timm.data.resolve_data_config({}, model=net)))
    torch.testing.assert_close(features, stored_features(), rtol=1e-5, atol=1e-5)


def test_an_exported_classifier_is_the_averaged_one(runs: Path) -> None:
    folder = RunFolder(runs / "classifier")
    net = timm.create_model(f"local-dir:{folder.path / 'export' / 'timm'}", pretrained=True)
    average = folder.trained(pytest.fail).average()
    assert average is not None
    assert all(torch.equal(value, average[f"net.{name}"]) for name, value in net.state_dict().items())
    assert net.pretrained_cfg["label_names"][:2] == ["smooth disk", "striped cross"]


def test_the_export_to_transformers_does_too(runs: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = runs / "pretraining" / "export" / "transformers"
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    config = json.loads((folder / "preprocessor_config.json").read_text())
    with torch.inference_mode():
        tokens = model(images({"mean": config["image_mean"], "std": config["image_std"]})).last_hidden_state
    torch.testing.assert_close(tokens[:, 0], stored_features(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["", "export/timm", "export/transformers"])
def test_init_takes_a_run_and_its_exports(what: str, runs: Path) -> None:
    recipe = RunFolder(runs / "pretraining").recipe()
    trained, started = recipe.build_model(), recipe.build_model()
    load_trained(trained, RunFolder(runs / "pretraining").trained(pytest.fail))
    said: list[str] = []
    load_init(started, str(runs / "pretraining" / what), said.append)
    part = MaskedAutoencoder.state_dict if not what else lambda model: model.encoder.state_dict()
    expected = part(trained)
    assert all(torch.equal(value, expected[name]) for name, value in part(started).items())
    assert ("a run's checkpoint of step 6" in said[0]) == (not what)


@pytest.mark.parametrize(
    ("what", "depth"), [("pretraining", 1), ("classifier", 2), ("classifier/export/timm", 2)]
)
def test_init_of_a_classifier_takes_them_too(what: str, depth: int, runs: Path) -> None:
    recipe = RunFolder(runs / "classifier").any_recipe()
    assert isinstance(recipe, FinetuneRecipe)
    config = recipe.model.model_copy(update={"depth": depth})
    model = config.build(image_size=recipe.size, in_chans=3, num_classes=10, seed=0)
    said: list[str] = []
    load_classifier_init(model.net, str(runs / what), said.append)
    kept = any("head of 10 classes is kept" in line for line in said)
    assert kept == (what != "pretraining")


def test_it_is_reported_embedded_evaluated_and_reconstructed(runs: Path, tmp_path: Path) -> None:
    etpp("report", runs / "pretraining", "--out", tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text()
    etpp("embed", runs / "pretraining", "--split", "eval", "--out", tmp_path / "eval.safetensors")
    embedded = read_embeddings(tmp_path / "eval.safetensors")
    torch.testing.assert_close(embedded.rows.features, stored_features(), rtol=1e-5, atol=1e-6)
    stored = read_embeddings(FIXTURES / "pretraining" / "embeddings" / "eval.safetensors")
    assert (embedded.names, embedded.classes) == (stored.names, stored.classes)
    etpp("evaluate", runs / "classifier")
    etpp("reconstruct", runs / "pretraining", "--out", tmp_path / "grids", "--count", "1")
    assert len(list((tmp_path / "grids").iterdir())) == 1
