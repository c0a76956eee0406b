"""Runs on images of which parts are missing: what is shown, and the same bits whatever interrupts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etpp_ssl.data.loader import Batch
from etpp_ssl.debug.reproduce import reproduce
from etpp_ssl.model.patches import gather_patches, patchify
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.base import Inputs
from etpp_ssl.tasks.mae import MaskedAutoencoding
from etpp_ssl.train.launch import pretrain

NODATA = -9999


def scenes(folder: Path, *, gaps: bool = True) -> Path:
    """40 scenes of two int16 channels; half of them lack a corner or a side, and one lacks everything."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:30, :44]
    for number in range(40):
        values = generator.integers(0, 4000, (30, 44, 2)).astype(np.int16)
        edge = generator.integers(5, 30)
        if gaps and number % 2:
            values[(rows + columns < edge) if number % 4 == 1 else (columns < edge // 3)] = NODATA
        if gaps and number == 11:
            values[:] = NODATA
        place = folder / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number:02d}.npy", values)
    return folder


Make = Callable[..., Recipe]


@pytest.fixture
def on_scenes(tiny_recipe: Make, tmp_path: Path) -> Make:
    folder = scenes(tmp_path / "scenes")

    def make(*overrides: str, root: Path = folder) -> Recipe:
        data = (
            f"{{name: folder, root: {root}, range: [0, 4000], nodata: {NODATA}, num_workers: 0, holdout: 8}}"
        )
        return tiny_recipe("in_chans=2", f"data={data}", "target=combined", *overrides)

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return RunFolder(folder).checkpoints()[0].model()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    timings = {"seconds", "images_per_second", "data_wait_share", "probe_seconds"}
    return [{k: v for k, v in row.items() if k not in timings} for row in RunFolder(folder).metrics()]


def assert_same(a: Path, b: Path) -> None:
    x, y = weights(a), weights(b)
    assert [name for name in x if not torch.equal(x[name], y[name])] == []
    assert rows_of(a) == rows_of(b)


def test_images_that_show_too_little_are_told_once_counted_and_end_no_run(
    on_scenes: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in sorted((tmp_path / "scenes").rglob("*.npy"))[::3]:
        np.save(file, np.full((30, 44, 2), NODATA, np.int16))
    run = pretrain(on_scenes("data.max_bad_share=0", "data.holdout=0"))
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("shows too little data") == 1
    assert run.state.num_without_data > 3
    assert f"{run.state.num_without_data} images showed too little data" in said
    assert rows_of(tmp_path / "run")[-1]["images_without_data"] == run.state.num_without_data


STAGES = (
    "curriculum.stages=[{bandwidth: [8, 12], share: 0.3, replay: {times: 2, buffer: 3}},"
    "{bandwidth: [12, 16], share: 0.3}, {bandwidth: [16, 24], share: 0.4}]"
)


@pytest.mark.parametrize(
    "setting", ["curriculum.crop=fourier", "curriculum.crop=lanczos", "data.decode=full"]
)
def test_resume_is_bitwise_with_any_workers(
    setting: str,
    on_scenes: Make,
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    run = pretrain(on_scenes(f"output={tmp_path / 'whole'}", STAGES, setting))
    assert run.state.num_without_data >= 1
    assert not run.state.bad_images
    for stop, workers in ((3, 2), (6, 0)):
        with crash_after(stop):
            pretrain(
                on_scenes(
                    f"output={tmp_path / 'cut'}",
                    STAGES,
                    setting,
                    f"data.num_workers={workers}",
                    "checkpoint.every_steps=2",
                )
            )
    pretrain(on_scenes(f"output={tmp_path / 'cut'}", STAGES, setting))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert all(math.isfinite(row["loss"]) for row in rows_of(tmp_path / "whole") if "loss" in row)


def test_encoder_and_loss_meet_patches_with_data_only(
    on_scenes: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Batch, Inputs]] = []
    real = MaskedAutoencoding.inputs

    def inputs(task: MaskedAutoencoding, batch: Batch, stage: Any) -> Inputs:
        found = real(task, batch, stage)
        seen.append((batch, found))
        return found

    monkeypatch.setattr(MaskedAutoencoding, "inputs", inputs)
    run = pretrain(on_scenes("budget_epochs=4", "micro_batch_size=3"))
    task: Any = run.task
    with_gaps = 0
    for batch, found in seen:
        assert batch.has_gaps == bool(batch.images.isnan().any()) == ("valid" in found)
        assert found["images"].isfinite().all()
        if not batch.has_gaps:
            continue
        with_gaps += 1
        pixels = patchify(found["valid"], task.model.patch_size).sum(dim=-1)
        # A quarter of 16 pixels, or nothing.
        assert set(pixels[pixels < 4].tolist()) <= {0}
        visible, predicted = (pixels.gather(1, found[ids]) for ids in ("ids_keep", "ids_predict"))
        assert (visible > 0).all()
        num_removed = found["ids_predict"].shape[1]
        assert ((predicted > 0).sum(dim=1) >= math.ceil(num_removed / 4)).all()
        # What the encoder is shown of missing pixels is the mean.
        if found["images"].shape[-2:] == batch.images.shape[-2:]:
            missing = batch.images.isnan().any(dim=1, keepdim=True).expand_as(found["images"])
            assert not found["images"][missing].any()
        patches = gather_patches(patchify(found["images"], task.model.patch_size), found["ids_keep"])
        assert patches.flatten(1).std(dim=1).min() > 0.1
    assert 3 < with_gaps < len(seen)


def test_without_missing_pixels_nodata_changes_no_bit(on_scenes: Make, tmp_path: Path) -> None:
    whole = scenes(tmp_path / "whole", gaps=False)
    pretrain(on_scenes(f"output={tmp_path / 'a'}", root=whole))
    pretrain(on_scenes(f"output={tmp_path / 'b'}", "data.nodata=null", "data.min_valid=1", root=whole))
    assert_same(tmp_path / "a", tmp_path / "b")


def test_how_a_batch_is_split_changes_rounding_only(on_scenes: Make, tmp_path: Path) -> None:
    for name, size in (("a", "null"), ("b", "3")):
        pretrain(on_scenes(f"output={tmp_path / name}", f"micro_batch_size={size}"))
    losses = [[row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dump_repeats_a_step_with_missing_pixels(on_scenes: Make, tmp_path: Path) -> None:
    from etpp_ssl.train.dump import write_dump
    from etpp_ssl.train.nonfinite import on_gradients
    from etpp_ssl.train.run import Run

    found: list[tuple[float, float, Path | None]] = []

    def dump(run: Run, loss: Tensor, norm: Tensor) -> None:
        assert run.batches is not None
        kept = run.batches.kept[run.state.step]
        if not found and any(batch.has_gaps for batch in kept):
            found.append((float(loss), float(norm), write_dump(run, run.state.step, kept)))

    on_gradients.append(dump)
    try:
        run = pretrain(on_scenes())
    finally:
        on_gradients.remove(dump)
    assert run.state.num_skipped == 0
    ((loss, norm, folder),) = found
    assert folder is not None
    repeated = reproduce(folder)
    assert not repeated.reproduced
    assert repeated.losses["loss"] == pytest.approx(loss, rel=1e-6)
    assert repeated.gradient_norm == pytest.approx(norm, rel=1e-5)


def test_held_out_images_with_missing_pixels_have_a_loss_of_their_own(
    on_scenes: Make, tmp_path: Path
) -> None:
    pretrain(on_scenes("probe=reconstruction"))
    (row,) = [row for row in rows_of(tmp_path / "run") if "heldout_loss" in row]
    assert math.isfinite(row["heldout_loss"])
    assert math.isfinite(row["heldout_loss_hog"])


def test_a_picture_of_a_reconstruction_counts_what_training_counts(on_scenes: Make, tmp_path: Path) -> None:
    import etpp_ssl
    from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data
    from etpp_ssl.data.views import EvalView
    from etpp_ssl.report.viewer import Viewer, images_of_files

    recipe = on_scenes()
    pretrain(recipe)
    run, file, bandwidth = RunFolder(tmp_path / "run"), tmp_path / "scenes/train/b/03.npy", (12, 16)
    shown = etpp_ssl.load(run.path).reconstruct(file, bandwidth)

    viewer = Viewer.of_run(run, seed=0)
    viewer.load(run.checkpoints()[0])
    view = EvalView(recipe.size, recipe.data.crop_pct)
    (image,) = images_of_files([file], 1, view=view, reading=recipe.data.reading(2))
    panels = viewer.look(image, bandwidth)
    assert panels.reconstruction.loss == pytest.approx(shown.loss, rel=1e-5)
    assert len(panels.predictions) > 3

    pixels = image.pixels[None]
    assert pixels.isnan().any()
    masker = recipe.build_masker()
    valid = masker.counted(pixels_with_data(pixels, bandwidth))
    mask = viewer.masker.everything(torch.tensor([0]), bandwidth, valid)
    crop = low_frequency_crop(viewer.normalise(pixels), bandwidth)
    with torch.no_grad():
        values, ids = viewer.model(crop, *mask)
    loss = recipe.build_objective()(values, ids, crop, valid).item()
    assert loss == pytest.approx(shown.loss, rel=1e-5)
    assert abs(recipe.build_objective()(values, ids, crop).item() / loss - 1) > 1e-3
    assert np.isfinite(shown.image).all()
