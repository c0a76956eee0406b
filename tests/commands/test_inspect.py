"""`etpp inspect`: what is printed, what is proposed, and what is written."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.commands.inspect import inspect, yaml_of
from etpp_ssl.data.formats.pictures import ArrayPicture
from etpp_ssl.data.proposal import propose
from etpp_ssl.data.statistics import Values, values_of
from etpp_ssl.recipe import Recipe, load_any


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *arguments])
    return int(stop.value.code or 0)


def saved(folder: Path, *images: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)
    return folder


def drawn(count: int, top: int, *, chans: int = 1, dtype: str = "uint16") -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [(draw.random((12, 14, chans)) * top).astype(dtype) for _ in range(count)]


def proposed(*images: np.ndarray, given: object = None) -> dict[str, object]:
    values = Values()
    for image in images:
        values.add(values_of(ArrayPicture(image), "a", None))
    proposal = propose(values, given, None)  # type: ignore[arg-type]
    assert proposal is not None
    return yaml.safe_load(yaml_of(proposal))["data"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("least", "most", "dtype", "expected"),
    [
        (0, 4094, "uint16", [0, 4095]),
        (100, 4095, "uint16", [0, 4095]),
        (0, 9800, "uint16", [0, 10000]),
        (0, 10001, "uint16", [0, 16383]),
        (0, 65535, "uint16", [0, 65535]),
        (-1024, 3071, "int16", [-1024, 4095]),
        (-900, 900, "int16", [-1000, 1000]),
        (0, 1, "uint16", [0, 1]),
        (0, 70000, "int32", [0, 100000]),
        (0.0, 0.93, "float32", [0, 0.93]),
        (271.2, 305.9, "float32", [271, 306]),
        (-0.31, 0.88, "float32", [-0.4, 0.9]),
        (5.0, 5.0, "float32", [0, 5]),
    ],
)
def test_the_range_follows_the_rule(least: float, most: float, dtype: str, expected: list[float]) -> None:
    image = np.linspace(least, most, 1000).reshape(10, 100, 1)
    image[0, :5], image[9, 95:] = least, most
    found = proposed(image.astype(dtype))
    np.testing.assert_allclose(found["range"], expected, atol=1e-9)  # type: ignore[arg-type]


def test_mean_and_std_are_those_of_the_range() -> None:
    images = drawn(3, 3000, chans=2)
    whole = np.concatenate([image.reshape(-1, 2) for image in images]) / 4095
    found = proposed(*images)
    np.testing.assert_allclose(found["mean"], whole.mean(axis=0), rtol=1e-3)  # type: ignore[arg-type]
    np.testing.assert_allclose(found["std"], whole.std(axis=0), rtol=1e-3)  # type: ignore[arg-type]
    halved = proposed(*images, given=((0, 8190),))
    np.testing.assert_allclose(halved["mean"], whole.mean(axis=0) / 2, rtol=1e-3)  # type: ignore[arg-type]


def test_channels_of_other_units_get_a_range_each() -> None:
    image = np.concatenate([drawn(1, 200)[0], drawn(1, 30000)[0]], axis=2)
    assert proposed(image)["range"] == [[0, 255], [0, 32767]]


def test_8_bits_need_no_range_and_types_together_take_their_own() -> None:
    small = drawn(20, 256, dtype="uint8")
    assert set(proposed(*small)) == {"mean", "std"}
    # Of 8 bits alone nothing tells pixels without data.
    small[0][0, 0] = 7
    values = Values()
    values.add(values_of(ArrayPicture(small[0]), "a", 7))
    proposal = propose(values, None, 7)
    assert proposal is not None
    assert proposal.layer()["data"]["range"] == [0, 255]
    assert proposal.layer()["data"]["nodata"] == 7
    both = proposed(*small, *drawn(20, 65536))
    assert both["range"] == "dtype"
    np.testing.assert_allclose(both["mean"], 0.5, atol=0.03)  # type: ignore[arg-type]
    np.testing.assert_allclose(both["std"], 12**-0.5, atol=0.03)  # type: ignore[arg-type]


def test_a_folder_tells_its_channels_depth_and_what_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "bands", *drawn(9, 3000, chans=5))
    np.save(folder / "other.npy", np.zeros((4, 4, 3), np.uint16))
    (folder / "broken.npy").write_bytes(b"no")
    (folder / "0.npy").rename(folder / "$\\frac{1}$ [b]\n^$.npy")
    assert run(str(folder), "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "9 read of 11 images" in text
    assert "12 of 16" in text
    assert "cannot be read: 'broken.npy': it is in no known image format" in text
    assert "cannot be read: 'other.npy': its shape is (4, 4, 3), not (height, width, 5)" in text
    block = yaml.safe_load(text[text.index("in_chans: ") :])
    assert block["in_chans"] == 5
    assert block["data"]["range"] == [0, 4095]
    assert len(block["data"]["mean"]) == 5
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size[0] > 1000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sheet.png"]


def test_photographs_have_the_channels_that_they_are_stored_with(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(4):
        pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    assert inspect(str(tmp_path)).proposal.in_chans == 3  # type: ignore[union-attr]
    gray = tmp_path / "gray"
    gray.mkdir()
    for number in range(4):
        Image.fromarray(draw.integers(0, 256, (20, 24), dtype=np.uint8)).save(gray / f"{number}.png")
    assert inspect(str(gray)).proposal.in_chans == 1  # type: ignore[union-attr]
    # What a run would see of them is what is counted.
    as_colour = inspect(str(gray), ["in_chans=3"]).values
    assert [len(channels) for channels in as_colour.channels.values()] == [3]


def test_16_bit_png_is_counted_at_its_depth(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 4096, (30, 30)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (channel,) = inspect(str(tmp_path)).values.channels["uint16"]
    assert channel.most == pixels.max()
    assert channel.levels() == len(np.unique(pixels))


def test_images_that_differ_in_channels_count_together_where_channels_are_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [drawn(1, 3000, chans=chans)[0] for chans in (2, 3, 5, 2)]
    folder = saved(tmp_path / "stains", *images)
    sampled = ["data.channel_sampling=1", "in_chans=1", "data.range=[0,4095]"]
    assert run(str(folder), *sampled, "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "4 read of 4 images" in text
    assert "all channels together" in text
    block = yaml.safe_load(text[text.index("in_chans: ") :])
    whole = np.concatenate([image.ravel() for image in images]) / 4095
    assert block["in_chans"] == 1
    assert block["data"]["range"] == [0, 4095]
    np.testing.assert_allclose(block["data"]["mean"], [whole.mean()], rtol=1e-3)
    np.testing.assert_allclose(block["data"]["std"], [whole.std()], rtol=1e-3)
    assert (tmp_path / "out" / "sheet.png").is_file()


def test_windows_are_counted_with_the_values_of_their_files(tmp_path: Path) -> None:
    images = [drawn(1, 3000)[0].repeat(3, axis=0).repeat(3, axis=1) for _ in range(3)]
    folder = saved(tmp_path / "large", *images)
    found = inspect(str(folder), ["data.tile=[9,14]"], images=0)
    assert found.proposal is not None
    assert found.proposal.range == ((0, 4095),)
    assert found.values.num_images == {"uint16": 3 * 4 * 3}
    (channel,) = found.values.channels["uint16"]
    whole = np.concatenate([image.ravel() for image in images])
    assert channel.total == whole.size
    assert (channel.least, channel.most) == (whole.min(), whole.max())
    np.testing.assert_allclose(channel.moments(), (whole.mean(), whole.std()), rtol=1e-12)


def test_windows_of_many_channels_need_no_in_chans(tmp_path: Path) -> None:
    folder = saved(tmp_path / "large", *drawn(3, 3000, chans=5))
    found = inspect(str(folder), ["data.tile=[6,14]"], images=0)
    assert found.proposal is not None
    assert found.proposal.in_chans == 5
    assert (found.values.sizes, found.values.unreadable) == ({(14, 6): 6}, {})


def test_slices_are_counted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volumes = [np.moveaxis(image, 2, 0) for image in drawn(4, 3000, chans=6)]
    folder = saved(tmp_path / "volumes", *volumes)
    assert run(str(folder), "data.frames=all", "data.axes=zhw", "--images", "10") == 0
    text = capsys.readouterr().out
    assert "10 read of 24 frames of 4 images" in text
    assert "\n10 .npy; 14 x 12 pixels; 10 of uint16" in text
    assert "in_chans: 1" in text
    found = inspect(str(folder), ["data.frames=all", "data.axes=zhw"], images=0)
    (channel,) = found.values.channels["uint16"]
    np.testing.assert_allclose(channel.moments()[0], np.mean(volumes), rtol=1e-12)


def write_stream(folder: Path, images: list[np.ndarray]) -> list[str]:
    """Three tars of arrays, and the overrides that name them."""
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number, image in enumerate(images[shard::3]):
                file = io.BytesIO()
                np.save(file, image)
                member = tarfile.TarInfo(f"{number}.npy")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
    return [
        "curriculum=constant",
        f"data={{name: webdataset, urls: {folder}, image_keys: [npy], num_images: 9}}",
    ]


def test_of_a_stream_the_beginnings_of_keyed_shards_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = drawn(9, 3000, chans=4)
    (tmp_path / "base.yaml").write_text(RECIPE)
    overrides = write_stream(tmp_path / "tars", images)
    found = inspect(str(tmp_path / "base.yaml"), overrides)
    assert found.proposal is not None
    assert (found.proposal.in_chans, found.proposal.range) == (4, ((0, 4095),))
    np.testing.assert_allclose(
        found.values.channels["uint16"][0].moments()[0], np.stack(images)[..., 0].mean()
    )
    few = inspect(str(tmp_path / "base.yaml"), overrides, images=6)
    assert sorted(few.source.name(number).rpartition("/")[2] for number in range(6)) == [
        f"{shard}.tar :: {number}" for shard in range(3) for number in range(2)
    ]
    assert run(str(tmp_path / "base.yaml"), *overrides, "--out", str(tmp_path / "out")) == 0
    assert "9 read of 9 images at the beginning of 3 shards" in capsys.readouterr().out
    assert (tmp_path / "out/sheet.png").is_file()
    # Which of them is met first depends on the seed.
    (tmp_path / "tars/0.tar").write_bytes(b"no")
    (note,) = inspect(str(tmp_path / "base.yaml"), [*overrides, "seed=2"]).notes[-1:]
    assert re.match(r"the sample ended early: shard '.*0\.tar' cannot be read after 1 try", note)


def test_a_value_that_stands_apart_is_taken_for_missing_data_unless_told_otherwise(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(100, 10, (20, 20, 1)).astype(np.float32)
    image[:4] = -9999
    folder = saved(tmp_path / "dem", image)
    found = inspect(str(folder))
    assert found.proposal is not None
    assert found.proposal.layer()["data"]["nodata"] == -9999
    assert found.values.num_missing == 80
    assert any("-9,999" in note for note in found.notes)
    kept = inspect(str(folder), nodata=float("nan"))
    assert kept.values.num_missing == 0
    assert "nodata" not in kept.proposal.layer()["data"]  # type: ignore[union-attr]
    other = inspect(str(folder), nodata=float(image[10, 10, 0]))
    assert other.values.num_missing == 1


def test_keys_that_need_a_range_are_taken_before_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image = drawn(1, 3000, dtype="int16")[0]
    image[:3] = -7
    saved(Path("scenes"), image)
    found = inspect("scenes", ["data.nodata=-7"])
    assert found.values.num_missing == 3 * 14
    assert found.proposal is not None
    assert found.proposal.layer()["data"]["range"] == [0, 4095]
    assert found.proposal.layer()["data"]["nodata"] == -7
    Path("base.yaml").write_text(RECIPE.replace("curriculum: constant", "curriculum: {name: constant}"))
    assert (
        run("base.yaml", "data.root=scenes", "data.nodata=-7", "data.clip=true", "--write", "mine.yaml") == 0
    )
    written = load_any("mine.yaml")
    assert written.data.range == (0, 4095)
    assert written.data.nodata == -7
    assert written.data.clip
    # A range that is there is kept, unless it is taken away.
    assert run("mine.yaml", "data.range=[0,9000]", "--write", "wide.yaml") == 0
    assert load_any("wide.yaml").data.range == (0, 9000)
    assert run("wide.yaml", "data.range=null", "--write", "anew.yaml") == 0
    assert load_any("anew.yaml").data.range == (0, 4095)


def test_floats_beside_integers_have_no_common_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "mixed", *drawn(2, 3000), *drawn(2, 1, dtype="float32"))
    assert run(str(folder), "--out", str(tmp_path / "out")) == 0
    text = capsys.readouterr().out
    assert "2 of uint16, 2 of float32" in text
    assert "no common range" in text
    assert "data:" not in text
    assert (tmp_path / "out" / "sheet.png").is_file()


RECIPE = """
output: runs/a
budget_epochs: 2
batch_size: 8
image_size: 32
data: {name: folder, root: nowhere, crop_scale: [0.5, 1.0], num_workers: 0}
curriculum: constant
"""


def test_a_recipe_is_written_that_extends_the_given_one_with_its_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("bands"), *drawn(6, 3000, chans=4))
    Path("base.yaml").write_text(RECIPE.replace("curriculum: constant", "curriculum: {name: constant}"))
    Path("deep").mkdir()
    arguments = ["base.yaml", "data.root=bands", "batch_size=4", "--write", "deep/mine.yaml"]
    assert run(*arguments, "--images", "3") == 0
    written = load_any("deep/mine.yaml")
    assert isinstance(written, Recipe)
    assert written.batch_size == 4
    assert written.in_chans == 4
    assert written.data.range == (0, 4095)
    assert written.data.crop_scale == (0.5, 1.0)
    assert written.budget_epochs == 2
    assert "extends: ../base.yaml" in Path("deep/mine.yaml").read_text()
    assert "of 3 of 6 images" in Path("deep/mine.yaml").read_text()
    mean, std = written.data.statistics(4)
    assert len(mean) == len(std) == 4
    # What was written is what is found again in the same images, in the range that it states.
    again = inspect("deep/mine.yaml", images=3).proposal
    assert again is not None
    np.testing.assert_allclose(again.mean, mean, rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bands", "--write", "x.yaml"], "--write needs a recipe to extend"),
        (["nothing"], "'nothing' does not exist"),
        (["empty"], "no image below"),
        (["broken"], "none of the 1 image can be read: '0.npy': "),
        (["missing"], "no pixel of the 2 images has data"),
        (["stream.yaml", "--images", "0"], "--images 0 reads all, and data.name webdataset is a stream"),
        (["stream.yaml"], "'a.tar' does not exist"),
        (["hollow.yaml"], "the stream has no image: shard '"),
        (["bands", "data.range=[3,1]"], "low < high"),
    ],
)
def test_mistakes_are_sentences_and_nothing_is_written(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("bands"), *drawn(2, 3000))
    saved(Path("missing"), *[np.full((3, 3, 1), np.nan, np.float32)] * 2)
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/0.npy").write_bytes(b"no")
    stream = RECIPE.replace("curriculum: constant", "").replace(
        "{name: folder, root: nowhere,", "{name: webdataset, urls: [a.tar], num_images: 3,"
    )
    Path("stream.yaml").write_text(stream)
    Path("b.tar").write_bytes(b"no")
    Path("hollow.yaml").write_text(stream.replace("a.tar]", "b.tar], retries: 0"))
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert sorted(tmp_path.rglob("*")) == before
