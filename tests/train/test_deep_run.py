"""Runs on values of more than 8 bits: exact resume, and the same features of run, export and `load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import etpp_ssl
from etpp_ssl.export.official import export_transformers
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

LOW, HIGH = -2048, 2047


@pytest.fixture
def deep_recipe(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny recipe on arrays (5, H, W) of int16 with 12 bits, some of their pixels without data."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            values = draw.integers(LOW, HIGH, (5, 21, 30), dtype=np.int16, endpoint=True)
            values[:, :3, : number % 7] = -9999
            np.save(tmp_path / "data" / split / f"{number:02}.npy", values)

    def build(*overrides: str) -> Recipe:
        data = [f"data.root={tmp_path / 'data'}", f"data.range=[{LOW},{HIGH}]", "data.nodata=-9999"]
        shape = ["data.axes=chw", "in_chans=5", "data.num_images=null", "data.labels=none"]
        return tiny_recipe("data=folder", *data, *shape, "budget_epochs=3", "probe=none", *overrides)

    return build


def test_resume_is_bitwise_with_any_workers_and_a_replay(
    deep_recipe: Callable[..., Recipe],
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    stages = (
        "curriculum.stages=[{bandwidth: [8, 12], share: 0.5, replay: {times: 2, buffer: 3}},"
        "{bandwidth: [16, 24], share: 0.5}]"
    )
    settings = [stages, "batch_size=8", "checkpoint.every_steps=2"]
    pretrain(deep_recipe(f"output={tmp_path / 'whole'}", *settings))
    for stop, workers in [(3, 0), (5, 2)]:
        cut = deep_recipe(f"output={tmp_path / 'cut'}", *settings, f"data.num_workers={workers}")
        with crash_after(stop):
            pretrain(cut)
    pretrain(deep_recipe(f"output={tmp_path / 'cut'}", *settings))
    whole, cut = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "cut"))
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    losses = [[row.get("loss") for row in RunFolder(tmp_path / name).metrics()] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_run_exports_and_embed_see_the_same_values(
    deep_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    pretrain(deep_recipe())
    files = sorted((tmp_path / "data" / "val").iterdir())
    encoder = etpp_ssl.load(tmp_path / "run")
    features = encoder.embed(files)
    assert torch.isfinite(features).all()
    values = np.load(files[0])
    assert torch.equal(encoder.embed([values])[0], features[0])
    # What the network is shown: the range, then mean and standard deviation.
    whole = etpp_ssl.Encoder(
        encoder.model,
        image_size=(21, 30),
        mean=encoder.mean,
        std=encoder.std,
        crop_pct=1.0,
        reading=encoder.reading,
    ).transform(values)
    back = (
        whole.double() * torch.tensor(encoder.std)[:, None, None] + torch.tensor(encoder.mean)[:, None, None]
    )
    truth = (values.astype(np.float64) - LOW) / (HIGH - LOW)
    assert np.abs(back.numpy() - truth)[values != -9999].max() < 2e-6

    folder = export(tmp_path / "run")
    assert json.loads((folder / "config.json").read_text())["values"]["range"] == [[LOW, HIGH]]
    assert f"values of {LOW} to {HIGH} scaled to [0, 1]" in (folder / "README.md").read_text()
    assert torch.equal(etpp_ssl.load(folder).embed(files), features)
    official = export_transformers(tmp_path / "run")
    config = json.loads((official / "preprocessor_config.json").read_text())
    assert config["do_rescale"] is False
    raw = (values - np.array(config["image_mean"])[:, None, None]) / np.array(config["image_std"])[
        :, None, None
    ]
    np.testing.assert_allclose(raw[values != -9999], whole.numpy()[values != -9999], atol=1e-5)
    torch.testing.assert_close(etpp_ssl.load(official).embed(files), features, atol=1e-6, rtol=0)
