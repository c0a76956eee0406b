"""The start check: a run without `data.range` stops where 8 bits would lose what its images hold."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import TINY

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.data.formats import jpeg, pillow
from etpp_ssl.data.formats.base import Picture, Reading
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.sources.folder import open_folder
from etpp_ssl.data.training import open_training
from etpp_ssl.dist.accelerator import StopRequest
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import prepare_run, pretrain
from etpp_ssl.train.loop import on_step_end, train
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.run import Run
from etpp_ssl.train.start import check_depth

FOLDER = ["data=folder", "data.root=images", "data.num_workers=0"]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the images."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def recipe(*overrides: str) -> Recipe:
    return Recipe.parse(TINY, [*FOLDER, "output=run", *overrides])


def check(*overrides: str) -> str:
    asked = recipe(*overrides)
    training = open_training(asked.data, in_chans=asked.in_chans, image_size=asked.size, seed=asked.seed)
    return check_depth(training, asked.data.reading(asked.in_chans), None)


def saved(folder: Path, dtype: str, low: float, high: float, *, count: int = 12, chans: int = 3) -> None:
    draw = np.random.default_rng(0)
    for number in range(count):
        values = low + (high - low) * draw.random((16, 24, chans))
        np.save(folder / f"{dtype}-{number}.npy", values.astype(dtype))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "sentence"),
    [
        ("uint16", 0, 4096, "the images hold uint16 values from 0 to 4,095, of which 8 bits leave 16 levels"),
        ("uint16", 256, 300, "of which 8 bits leave 1 level:"),
        ("uint16", 0, 2**14 - 256, "of which 8 bits leave 63 levels"),
        ("int16", -1024, 3000, "the images hold int16 values from -1,02"),
        ("int8", -50, 50, "the images hold int8 values from -49 to 49, which 8 bits do not"),
        ("float32", 0, 1, "the images hold float32 values from "),
        ("uint32", 0, 1e6, "the images hold uint32 values"),
    ],
)
def test_values_that_8_bits_lose_stop_the_start(
    images: Path, dtype: str, low: float, high: float, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(images, dtype, low, high)
    with pytest.raises(UserError, match=r"`etpp inspect` with this recipe proposes data\.range") as error:
        check()
    assert sentence in str(error.value)
    Path("recipe.yaml").write_text(TINY)
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "recipe.yaml", *FOLDER, "output=run"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not Path("run").exists()
    with pytest.raises(SystemExit) as stop:
        main(["plan", "recipe.yaml", *FOLDER])
    assert stop.value.code == 0
    planned = " ".join(capsys.readouterr().out.split())
    assert f"warning: training would not start here: data: the images hold {dtype} values" in planned


@pytest.mark.parametrize("share", [1, 6])
def test_several_types_stop_the_start(images: Path, share: int) -> None:
    saved(images, "uint16", 0, 65536, count=12 - share)
    for number in range(share):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    with pytest.raises(UserError, match=r"several types \(\d+ of uint16, \d+ of uint8 in a sample\)"):
        check()


def test_16_bits_that_use_their_range_go_on_with_a_line(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(images, "uint16", 0, 65536)
    pretrain(recipe("budget_epochs=1"))
    line = "data: of 16 bits the high byte is kept; data.range=[0,65535] keeps all"
    assert capsys.readouterr().err.count(line) == 1
    # A run that has begun is resumed as it was.
    pretrain(recipe("budget_epochs=1"))
    assert line not in capsys.readouterr().err


def test_with_a_range_nothing_is_looked_at(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(images, "float32", 0, 1)
    assert check("data.range=[0,1]") == ""


def test_a_channel_without_any_difference_says_nothing(images: Path) -> None:
    saved(images, "uint16", 0, 65536)
    for file in images.iterdir():
        values = np.load(file)
        values[:, :, 1] = 7
        np.save(file, values)
    assert "high byte" in check()


def test_of_photographs_only_headers_are_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for number, end in enumerate((".jpg", ".png", ".webp", ".bmp")):
        Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(images / f"{number}{end}")
    (images / "broken.jpg").write_bytes(b"no")

    def decoded(*args: object) -> Picture:
        raise AssertionError("a photograph was decoded")

    monkeypatch.setattr(jpeg, "from_picture", decoded)
    monkeypatch.setattr(pillow, "_from_image", decoded)
    assert check() == ""
    assert check("data.holdout=2") == ""


def streamed(folder: Path, **options: object) -> list[str]:
    """Overrides for a stream of one tar of the folder's images."""
    with tarfile.open("images.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    keys = {
        "name": "webdataset",
        "urls": "images.tar",
        "image_keys": ["npy", "jpg"],
        "num_images": 20,
        **options,
    }
    return ["curriculum=constant", f"data={json.dumps(keys)}"]


def test_the_beginning_of_a_stream_is_looked_at(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(images, "uint16", 0, 4096)
    with pytest.raises(UserError, match="uint16 values from 0 to 4,095, of which 8 bits leave 16 levels"):
        check(*streamed(images))
    assert check(*streamed(images, range=[0, 4095])) == ""
    Path("images.tar").write_bytes(b"no tar")
    # The loader says what is wrong with it.
    stream = json.dumps({"name": "webdataset", "urls": "images.tar", "num_images": 20, "retries": 0})
    assert check("curriculum=constant", f"data={stream}") == ""


def test_of_photographs_in_a_stream_only_headers_are_read(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        Image.new("RGB", (20, 30)).save(images / f"{number}.jpg")
    monkeypatch.setattr(jpeg.JpegPicture, "region", None)
    assert check(*streamed(images)) == ""


def test_synthetic_images_stop_where_their_depth_needs_a_range() -> None:
    synthetic = ["data=synthetic", "data.num_images=40"]
    assert check(*synthetic) == ""
    assert check(*synthetic, "data.holdout=4") == ""
    assert "high byte" in check(*synthetic, "data.dtype=uint16")
    for wrong in (["data.dtype=float32"], ["data.dtype=uint16", "data.bits=12"],
                  ["data.dtype=uint16", "data.faint=true"], ["data.dtype=int16"]):  # fmt: skip
        with pytest.raises(UserError, match="etpp inspect"):
            check(*synthetic, *wrong)


def outside(images: Path, *overrides: str) -> tuple[Run, list[int]]:
    """A run on twelve images of which five leave the range, and the counts in its rows."""
    saved(images, "float32", 0.1, 0.9)
    for number in range(5):
        file = images / f"float32-{number}.npy"
        values = np.load(file)
        values[::2] += 1
        np.save(file, values)
    run = pretrain(recipe("data.range=[0,1]", "budget_epochs=4", "data.crop_scale=[1,1]", *overrides))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return run, [line.get("images_outside_range", 0) for line in lines if "loss" in line]


def test_images_that_leave_the_range_are_counted_and_told_once(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, counts = outside(images)
    loaded = run.curriculum.stage_at(run.curriculum.num_steps - 1).samples.stop
    order = KeyedOrder(12, run.recipe.seed)
    files = open_folder("", images, Reading(3))
    left = {f"float32-{number}.npy" for number in range(5)}
    expected = sum(files.name(order.index(sample)) in left for sample in range(loaded))
    assert run.state.num_outside == expected > 0
    assert counts == sorted(counts)
    assert counts[-1] == expected
    line = f"{expected} of {loaded} images had values outside data.range (data.clip=true would clip them)"
    assert capsys.readouterr().err.count(line) == 1


REPLAY = (
    "curriculum.stages=[{bandwidth: [8, 12], share: 0.5, replay: {times: 2, buffer: 20}}, "
    "{bandwidth: [16, 24], share: 0.5}]"
)


@pytest.mark.parametrize("stages", [[], [REPLAY]], ids=["plain", "replay"])
def test_a_resumed_run_has_counted_the_same(images: Path, stages: list[str]) -> None:
    whole, _ = outside(images, *stages)
    for halted in (1, 4):
        stop = StopRequest()

        def halt(run: Run, at: int = halted, request: StopRequest = stop) -> None:
            if run.state.step == at:
                request.signum = 15

        again = recipe(
            "data.range=[0,1]", "budget_epochs=4", "data.crop_scale=[1,1]", f"output=run{halted}", *stages
        )
        run = open_run(again)
        on_step_end.append(halt)
        try:
            prepare_run(run)
            assert train(run, stop) == 15
        finally:
            on_step_end.remove(halt)
            assert run.batches is not None
            run.batches.close()
            run.lock.release()
        assert pretrain(again).state.num_outside == whole.state.num_outside


def test_a_fork_counts_on(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, counts = outside(images)
    parent = pretrain(recipe("data.range=[0,1]", "budget_epochs=2", "data.crop_scale=[1,1]", "output=parent"))
    assert 0 < parent.state.num_outside < counts[-1]
    longer = recipe("data.range=[0,1]", "budget_epochs=4", "data.crop_scale=[1,1]", "output=fork")
    capsys.readouterr()
    assert pretrain(longer, fork=Path("parent")).state.num_outside == whole.state.num_outside == counts[-1]
    loaded = whole.curriculum.stage_at(whole.curriculum.num_steps - 1).samples.stop
    assert f"{counts[-1]} of {loaded} images had values" in capsys.readouterr().err


def test_clipped_images_are_told_as_such(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outside(images, "data.clip=true")
    assert "images had values outside data.range, which were clipped" in capsys.readouterr().err


def test_images_within_the_range_are_not_spoken_of(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(images, "float32", 0.1, 0.9)
    run = pretrain(recipe("data.range=[0,1]", "budget_epochs=2"))
    assert run.state.num_outside == 0
    assert "outside" not in capsys.readouterr().err
    assert "outside" not in Path("run/metrics.jsonl").read_text()
