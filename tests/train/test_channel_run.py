"""A run on images that differ in channels: resume, probe, embeddings and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import etpp_ssl
from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain

Make = Callable[..., Recipe]


@pytest.fixture
def on_channels(tiny_recipe: Make, tmp_path: Path) -> Make:
    """36 scenes of 1, 3 or 5 channels; those of class b are brighter in all of them."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "scenes"
    for number in range(36):
        bright = number % 2
        values = generator.integers(0, 1500, (24, 30, (1, 3, 5)[number % 3])) + 2000 * bright
        place = folder / "train" / "ab"[bright]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number:02d}.npy", values.astype(np.int16))

    def make(*overrides: str) -> Recipe:
        data = (
            f"{{name: folder, root: {folder}, range: [0, 4000], channel_sampling: 1, num_workers: 0, "
            f"holdout: 12}}"
        )
        return tiny_recipe("in_chans=1", f"data={data}", *overrides)

    return make


def etpp(*arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


def test_it_trains_resumes_and_is_evaluated_over_all_channels(
    on_channels: Make,
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    settings = ("probe=knn", "probe.k=3")
    pretrain(on_channels(*settings, f"output={tmp_path / 'run'}"))
    with crash_after(4):
        pretrain(on_channels(*settings, f"output={tmp_path / 'cut'}", "checkpoint.every_steps=2"))
    pretrain(on_channels(*settings, f"output={tmp_path / 'cut'}", "data.num_workers=2"))
    whole, cut = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("run", "cut"))
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    (row,) = [row for row in RunFolder(tmp_path / "run").metrics() if "knn_top1" in row]
    assert row["knn_top1"] == 100.0

    etpp("embed", tmp_path / "run", "--split", "train")
    etpp("embed", tmp_path / "run", tmp_path / "scenes/train/a")
    written = load_file(tmp_path / "run/embeddings/train.safetensors")
    names = written["names"].numpy().tobytes().decode().split("\0")
    encoder = etpp_ssl.load(tmp_path / "run")
    files = [tmp_path / "scenes/train" / name for name in names]
    torch.testing.assert_close(encoder.embed(files), written["features"], rtol=0, atol=1e-5)
    for file, row_of in zip(files[:6], written["features"], strict=False):
        values = np.load(file)
        apart = torch.cat([encoder.embed(values[:, :, c : c + 1]) for c in range(values.shape[2])])
        torch.testing.assert_close(apart.mean(dim=0), row_of, rtol=0, atol=1e-5)

    five = next(file for file in files if np.load(file).shape[2] == 5)
    shown = encoder.reconstruct(five, seed=1)
    assert shown.image.shape == (16, 24, 1)
    assert math.isfinite(shown.loss)
    with pytest.raises(UserError, match="has 5 channels, and the encoder takes 1 at once: embed"):
        encoder.patches(five)
    etpp("reconstruct", tmp_path / "run", "--count", "2")
    etpp("reconstruct", tmp_path / "run", five, "--seed", "2")


def test_a_decoder_is_judged_on_channels_that_are_drawn(on_channels: Make, tmp_path: Path) -> None:
    pretrain(on_channels("probe=reconstruction"))
    (row,) = [row for row in RunFolder(tmp_path / "run").metrics() if "heldout_loss" in row]
    assert math.isfinite(row["heldout_loss"])


def test_what_cannot_do_with_any_number_of_channels_says_so(on_channels: Make) -> None:
    with pytest.raises(UserError, match=r"probe\.name is linear.*use knn, linear_cached or reconstruction"):
        on_channels("probe=linear")
    with pytest.raises(UserError, match=r"data\.channel_sampling is 1, but in_chans is 2"):
        on_channels("in_chans=2").open_training()
