"""The start check: a run without `data.range` stops where 8 bits would lose what its images hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import TINY

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.data.formats import jpeg, pillow
from etpp_ssl.data.formats.base import Picture
from etpp_ssl.data.training import open_training
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.depth import check_depth
from etpp_ssl.train.launch import pretrain

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
    return check_depth(training, asked.data.reading(asked.in_chans))


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


def test_synthetic_images_stop_where_their_depth_needs_a_range() -> None:
    synthetic = ["data=synthetic", "data.num_images=40"]
    assert check(*synthetic) == ""
    assert check(*synthetic, "data.holdout=4") == ""
    assert "high byte" in check(*synthetic, "data.dtype=uint16")
    for wrong in (["data.dtype=float32"], ["data.dtype=uint16", "data.bits=12"],
                  ["data.dtype=uint16", "data.faint=true"], ["data.dtype=int16"]):  # fmt: skip
        with pytest.raises(UserError, match="etpp inspect"):
            check(*synthetic, *wrong)
