"""Conversion to shards: every image at its place, the same bytes always, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from ranks import Server

from etpp_ssl.cli import main
from etpp_ssl.commands.prepare import PrepareConfig, Prepared, from_options, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.formats import decode
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.loader import Batch, BatchBuilder, load_batches
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.shard_writer import RecodeConfig
from etpp_ssl.data.sources.base import DataConfig
from etpp_ssl.data.sources.folder import FileSource, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.views import TrainView
from etpp_ssl.recipe import Recipe

ODD_NAMES: list[str | bytes] = [
    "oak/line\nbreak.png",
    b"oak/latin-\xe9.png",
    "oak/many.dots.in.it.PNG",
    "pine/\u677e\u6811 \u00e9.jpeg",
    "pine/" + 7 * "deep/" + 220 * "x" + ".png",
    "pine/.hidden/../plain.png",
    "yew/a b'\"\\.png",
]


def write_images(root: Path, names: list[str | bytes], size: tuple[int, int] = (9, 7)) -> Path:
    """A noise image for each name."""
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (size[1] + number, size[0], 3), dtype=np.uint8)
        with open(path, "wb") as file:
            Image.fromarray(noise).save(file, "JPEG" if b".jp" in os.fsencode(name) else "PNG")
    return root


def plain_names(count: int) -> list[str | bytes]:
    return [f"{'oak' if number % 3 else 'pine'}/{number:03d}.png" for number in range(count)]


SMALL = 3000 / 2**20
"""Megabytes of a shard, so that tiny data sets have several."""


def convert(source: Path, destination: Path, **settings: Any) -> list[Prepared]:
    return prepare(source, destination, PrepareConfig(**settings), lambda done, total: None)


def open_one(config: DataConfig, split: str = "train") -> FileSource:
    source = config.open(split, in_chans=3, image_size=(8, 8), seed=0)
    assert isinstance(source, FileSource)
    return source


def assert_same_source(shards: FileSource, files: FileSource) -> None:
    assert shards.files == files.files
    assert shards.classes == files.classes
    for index in range(len(files)):
        assert shards.read(index) == files.read(index)
        assert shards.label(index) == files.label(index)
        assert shards.name(index) == files.name(index)
        assert shards.stored_size(index) == files.stored_size(index)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_shards_hold_the_same_bytes_names_labels_and_order(tmp_path: Path) -> None:
    write_images(tmp_path / "files/train", [*plain_names(20), *ODD_NAMES])
    write_images(tmp_path / "files/val", plain_names(5))
    splits = convert(tmp_path / "files", tmp_path / "shards", workers=3, shard_mb=SMALL)
    assert [split.images for split in splits] == [27, 5]
    assert splits[0].shards > 3
    files, shards = FolderConfig(root=str(tmp_path / "files")), ShardsConfig(root=str(tmp_path / "shards"))
    for split in ("train", "eval"):
        assert_same_source(open_one(shards, split), open_one(files, split))
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["prepare.json", "train", "val"]
    assert {path.suffix for path in (tmp_path / "shards/train").iterdir()} == {".tar", ".json"}


def test_the_tars_are_plain_webdataset_tars(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(4))
    convert(tmp_path / "files", tmp_path / "shards")
    source = open_one(ShardsConfig(root=str(tmp_path / "shards")))
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {member.mtime for member in tar.getmembers()} == {0}
    expected = {f"{index:09d}.png": source.read(index) for index in range(4)}
    expected |= {f"{index:09d}.cls": str(source.label(index)).encode() for index in range(4)}
    assert members == expected
    (tmp_path / "shards/index.json").unlink()
    foreign = open_one(ShardsConfig(root=str(tmp_path / "shards")))
    assert [foreign.read(i) for i in range(4)] == [source.read(i) for i in range(4)]
    assert [foreign.label(i) for i in range(4)] == [source.label(i) for i in range(4)]


def test_members_have_the_extensions_that_timm_looks_for(tmp_path: Path) -> None:
    write_images(tmp_path / "files", ["a.jpeg", "b.JPG", "c.Png"])
    (tmp_path / "files/odd.name").write_bytes((tmp_path / "files/a.jpeg").read_bytes())
    (tmp_path / "list.txt").write_text(
        "".join(f"files/{n}\n" for n in ("a.jpeg", "b.JPG", "c.Png", "odd.name"))
    )
    convert(tmp_path / "list.txt", tmp_path / "shards")
    with tarfile.open(tmp_path / "shards/shard-000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["jpg", "jpg", "png", "img"]


def test_a_keyed_run_sees_the_same_batches(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(13))
    (tmp_path / "files/oak/001.png").write_bytes(b"broken")
    convert(tmp_path / "files", tmp_path / "shards", shard_mb=SMALL)

    def train(config: DataConfig) -> list[Batch]:
        source = open_one(config)
        order = KeyedOrder(len(source), 5)
        view = TrainView(image_size=(6, 10), crop_scale=(0.3, 1.0), flip=True, lanczos=False, seed=5)
        requests = [*RequestSampler(order, _Plan, range(6))]
        builder = BatchBuilder(source, view, order)
        return list(load_batches(builder, requests, num_workers=0, prefetch=2, pin_memory=False))

    ones = train(FolderConfig(root=str(tmp_path / "files")))
    others = train(ShardsConfig(root=str(tmp_path / "shards")))
    assert any(batch.bad for batch in ones)
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert (one.request, one.bad) == (other.request, other.bad)


class _Plan:
    bandwidth = (6, 10)
    progress = 0.5

    def __init__(self, step: int) -> None:
        self.samples = range(5 * step, 5 * step + 5)


def test_a_run_ends_with_the_same_weights(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from etpp_ssl.train.launch import pretrain

    write_images(tmp_path / "files", plain_names(24), (26, 18))
    convert(tmp_path / "files", tmp_path / "shards")
    weights = []
    for name, root in (("folder", "files"), ("shards", "shards")):
        output = tmp_path / f"run-{name}"
        pretrain(
            tiny_recipe(
                f"data={name}", f"data.root={tmp_path / root}", "data.num_workers=0", f"output={output}"
            )
        )
        (newest,) = sorted(output.glob("checkpoints/*/model.safetensors"))[-1:]
        weights.append(newest.read_bytes())
    assert weights[0] == weights[1]


def test_the_same_images_give_the_same_files(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(12))
    for settings in ({}, {"recode": RecodeConfig(size=5)}):
        convert(tmp_path / "files", tmp_path / "one", shard_mb=SMALL, **settings)
        for path in (tmp_path / "files").rglob("*.png"):
            os.utime(path, (1, 1))
        convert(tmp_path / "files", tmp_path / "two", workers=2, shard_mb=SMALL, **settings)
        assert contents(tmp_path / "one") == contents(tmp_path / "two")
        for name in ("one", "two"):
            (tmp_path / name).rename(tmp_path / f"{name}-{len(settings)}")


def test_recoding_bounds_the_shorter_side_and_keeps_colour(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 40 * 24 * 3).reshape(24, 40, 3).astype(np.uint8)
    for name, picture in (("a", ramp), ("b", ramp.transpose(1, 0, 2)), ("c", ramp[:6, :8])):
        (tmp_path / "files").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "files" / f"{name}.png")
    convert(tmp_path / "files", tmp_path / "shards", recode=RecodeConfig(size=9, quality=95))
    source = open_one(ShardsConfig(root=str(tmp_path / "shards")))
    assert [source.open(i).channels()[0].size for i in range(3)] == [(15, 9), (9, 15), (8, 6)]
    with Image.open(io.BytesIO(source.read(0))) as image:
        assert image.format == "JPEG"
        # Sampling factors of the components, as the decoder reads them: 4:4:4.
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # type: ignore[attr-defined]
    expected = decode((tmp_path / "files/c.png").read_bytes(), Reading(3))[0]
    difference = np.asarray(source.open(2).channels()[0]).astype(int) - np.asarray(expected)
    assert abs(difference).mean() < 3
    convert(tmp_path / "files", tmp_path / "low", recode=RecodeConfig(size=9, quality=10))
    low = open_one(ShardsConfig(root=str(tmp_path / "low")))
    assert sum(map(low.stored_size, range(3))) < sum(map(source.stored_size, range(3)))
    assert low.fingerprint() != source.fingerprint()


@pytest.mark.parametrize("recode", [None, RecodeConfig(size=5)])
def test_bad_images_keep_their_places_or_are_left_out(recode: RecodeConfig | None, tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(6))
    (tmp_path / "files/oak/002.png").write_bytes(b"no image")
    bad = open_one(FolderConfig(root=str(tmp_path / "files"))).files.index("oak/002.png")
    (kept,) = convert(tmp_path / "files", tmp_path / "kept", recode=recode)
    source = open_one(ShardsConfig(root=str(tmp_path / "kept")))
    assert source.read(bad) == b"no image"
    with pytest.raises(UnreadableImage):
        source.open(bad).channels()
    assert [name for name, _ in kept.bad] == ["oak/002.png"]
    (skipped,) = convert(tmp_path / "files", tmp_path / "skipped", recode=recode, skip_bad=True)
    assert (skipped.images, [name for name, _ in skipped.bad]) == (5, ["oak/002.png"])
    rest = open_one(ShardsConfig(root=str(tmp_path / "skipped")))
    assert rest.files == [file for file in source.files if file != "oak/002.png"]
    for index in range(5):
        rest.open(index).channels()


def test_a_stopped_conversion_is_not_taken_for_a_finished_one_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "files/train", plain_names(20))
    write_images(tmp_path / "files/val", plain_names(9))
    convert(tmp_path / "files", tmp_path / "whole", shard_mb=SMALL)
    for stop in (1, 8, 20, 24):

        def advance(done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "files", tmp_path / "shards", PrepareConfig(shard_mb=SMALL), advance)
        assert not (tmp_path / "shards").exists()
    first = tmp_path / "shards.partial/train/shard-000000.tar"
    before = first.stat().st_mtime_ns
    convert(tmp_path / "files", tmp_path / "shards", shard_mb=SMALL)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")
    assert (tmp_path / "shards/train/shard-000000.tar").stat().st_mtime_ns == before
    assert not (tmp_path / "shards.partial").exists()


def test_other_settings_start_over(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(20))
    convert(tmp_path / "files", tmp_path / "whole", shard_mb=SMALL)

    def advance(done: int, total: int) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(
            tmp_path / "files",
            tmp_path / "shards",
            PrepareConfig(recode=RecodeConfig(size=3), shard_mb=SMALL),
            advance,
        )
    convert(tmp_path / "files", tmp_path / "shards", shard_mb=SMALL)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_a_killed_process_leaves_nothing_that_looks_finished(tmp_path: Path, ranks: Server) -> None:
    write_images(tmp_path / "files", plain_names(60), (200, 150))
    command = ["prepare", str(tmp_path / "files"), str(tmp_path / "shards")]
    command += ["--size", "140", "--shard-mb", "1", "--workers", "1"]
    (process,) = ranks.start(command, 1)
    first = tmp_path / "shards.partial/shard-000000.tar"
    while process.code is None and not first.exists():
        time.sleep(0.002)
    process.send(signal.SIGKILL)
    if process.wait() == -signal.SIGKILL:
        assert not (tmp_path / "shards").exists()
    ranks.run(command, 1)
    convert(tmp_path / "files", tmp_path / "whole", recode=RecodeConfig(size=140), shard_mb=1)
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_a_second_process_is_told_that_one_is_at_work(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(6))

    def advance(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(UserError, match=r"^DST '.*/shards' is being written by another process$"):
                convert(tmp_path / "files", tmp_path / "shards")

    prepare(tmp_path / "files", tmp_path / "shards", PrepareConfig(), advance)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "shards"]
    assert len(open_one(ShardsConfig(root=str(tmp_path / "shards")))) == 6


def test_an_empty_working_folder_can_be_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "files", plain_names(4))
    (tmp_path / "shards").mkdir()
    monkeypatch.chdir(tmp_path / "shards")
    convert(Path("../files"), Path("."))
    assert len(open_one(ShardsConfig(root=str(tmp_path / "shards")))) == 4


def test_a_folder_that_is_not_ours_is_not_removed(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(4))
    (tmp_path / "shards.partial").mkdir()
    (tmp_path / "shards.partial/notes").write_text("mine")
    with pytest.raises(UserError, match="other files: remove it"):
        convert(tmp_path / "files", tmp_path / "shards")
    assert (tmp_path / "shards.partial/notes").read_text() == "mine"


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(4))
    one = convert(tmp_path / "files", tmp_path / "shards")
    before = (tmp_path / "shards/shard-000000.tar").stat().st_mtime_ns
    assert convert(tmp_path / "files", tmp_path / "shards") == one
    assert (tmp_path / "shards/shard-000000.tar").stat().st_mtime_ns == before
    for settings in ({"skip_bad": True}, {"recode": RecodeConfig()}):
        with pytest.raises(UserError, match="other images or settings"):
            convert(tmp_path / "files", tmp_path / "shards", **settings)
    write_images(tmp_path / "files", plain_names(5))
    with pytest.raises(UserError, match="other images or settings"):
        convert(tmp_path / "files", tmp_path / "shards")


def test_a_list_of_files_and_shards_are_sources_too(tmp_path: Path) -> None:
    write_images(tmp_path / "files", plain_names(12))
    (tmp_path / "list.txt").write_text("files/oak/001.png\toak\nfiles/pine/000.png\tpine\n")
    convert(tmp_path / "list.txt", tmp_path / "listed", shard_mb=SMALL)
    listed = open_one(ShardsConfig(root=str(tmp_path / "listed")))
    assert listed.files == ["files/oak/001.png", "files/pine/000.png"]
    assert (listed.classes, listed.label(0), listed.label(1)) == (["oak", "pine"], 0, 1)
    convert(tmp_path / "files", tmp_path / "shards", shard_mb=SMALL)
    convert(tmp_path / "shards", tmp_path / "again", workers=3, shard_mb=SMALL)
    assert_same_source(
        open_one(ShardsConfig(root=str(tmp_path / "again"))),
        open_one(FolderConfig(root=str(tmp_path / "files"))),
    )


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no source": (["{tmp}/nowhere", "{tmp}/new"], "does not exist"),
    "no image": (["{tmp}/empty", "{tmp}/new"], "no image below"),
    "inside": (["{tmp}/files", "{tmp}/files/new"], "lies inside SRC"),
    "itself": (["{tmp}/files", "{tmp}/files"], "lies inside SRC"),
    "a file": (["{tmp}/files", "{tmp}/text"], "is a file"),
    "below a file": (["{tmp}/files", "{tmp}/text/new"], "cannot be written"),
    "mount point": (["{tmp}/files", "/"], "is a mount point"),
    "other files": (["{tmp}/files", "{tmp}/other"], "holds other files"),
    "size": (["{tmp}/files", "{tmp}/new", "--size", "0"], "--size is 0"),
    "quality 0": (["{tmp}/files", "{tmp}/new", "--quality", "0"], "--quality is 0"),
    "quality 101": (["{tmp}/files", "{tmp}/new", "--quality", "101"], "--quality is 101"),
    "shard size": (["{tmp}/files", "{tmp}/new", "--shard-mb", "0"], "--shard-mb is 0"),
    "workers": (["{tmp}/files", "{tmp}/new", "--workers", "0"], "--workers is 0"),
    "nothing left": (
        ["{tmp}/broken", "{tmp}/new"],
        "none of the 1 images can be read, the first one 'a.png'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "files", plain_names(3))
    for folder in ("empty", "other", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text").write_text("")
    (tmp_path / "other/notes").write_text("")
    (tmp_path / "broken/a.png").write_bytes(b"")
    arguments, words = MISTAKES[name]
    with pytest.raises(SystemExit) as stop:
        main(["prepare", *(argument.format(tmp=tmp_path) for argument in arguments)])
    assert stop.value.code == 2
    *found, line = capsys.readouterr().err.splitlines()
    assert [said.partition(" in ")[0] for said in found] == (
        ["etpp: 1 image"] if name == "nothing left" else []
    )
    assert line.startswith("etpp: error: ")
    assert words in line
    assert not (tmp_path / "new").exists()


def test_a_small_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "files", plain_names(3))
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    for recode in (None, RecodeConfig()):
        with pytest.raises(UserError, match="GB free"):
            convert(tmp_path / "files", tmp_path / "shards", recode=recode)


def write_pointers(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def test_headers_are_checked_and_what_is_no_image_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3,000 pointers of Git LFS were "0 bad"."""
    write_images(tmp_path / "files/oak", ["a.png", "b.png"])
    names = [f"{number:02d}.jpg" for number in range(60)]
    write_pointers(tmp_path / "files/pine", *names)
    # The header of a file that ends early is whole.
    (tmp_path / "files/oak/b.png").write_bytes((tmp_path / "files/oak/b.png").read_bytes()[:60])
    (tmp_path / "files/oak/c.HEIC").touch()
    command = ["prepare", str(tmp_path / "files"), str(tmp_path / "shards")]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert "62 images in 1 shard, 0.1 MB, 60 bad" in printed.out
    reason = "it is a pointer of Git LFS: `git lfs pull` fetches the image"
    assert printed.err.splitlines() == [
        f"etpp: 62 images in '{tmp_path}/files' (60 .jpg, 2 .png; 2 classes); left out: 1 .heic",
        *(f"etpp: kept as it is: 'pine/{name}': {reason}" for name in names[:50]),
        f"etpp: kept as it is: 10 more: {reason}",
    ]
    source = open_one(ShardsConfig(root=str(tmp_path / "shards")))
    assert f"60 were unreadable when they were written, as 'pine/00.jpg': {reason}" in source.describe()


def write_deep(root: Path) -> dict[str, np.ndarray]:
    """Gray images of 12 bits in four formats, (H, W) each."""
    draw = np.random.default_rng(0)
    found = {f"{n}{kind}": draw.integers(0, 4096, (9, 14), np.uint16) for n, kind in enumerate(DEEP)}
    root.mkdir()
    for name, values in found.items():
        DEEP[Path(name).suffix](root / name, values)
    return found


DEEP: dict[str, Callable[[Path, np.ndarray], Any]] = {
    ".png": lambda path, values: Image.fromarray(values).save(path),
    ".npy": lambda path, values: np.save(path, values.astype(np.float32)),
    ".tif": lambda path, values: tifffile.imwrite(path, values),
    ".npz": lambda path, values: np.savez(path, values),
}


@pytest.mark.parametrize("skip_bad", [False, True])
def test_values_of_any_depth_are_the_same_in_shards(skip_bad: bool, tmp_path: Path) -> None:
    values = write_deep(tmp_path / "files")
    np.save(tmp_path / "files/5.npy", np.zeros((3, 9, 14), np.uint16))
    (found,) = convert(tmp_path / "files", tmp_path / "shards", skip_bad=skip_bad)
    assert (found.images, found.bad) == (5, [])
    deep = {"range": (0, 4095), "channels": (0,)}
    shards = ShardsConfig(root=str(tmp_path / "shards"), **deep)
    source = shards.open("train", in_chans=1, image_size=(8, 8), seed=0)
    for index, (name, expected) in enumerate(values.items()):
        assert source.name(index) == name
        pixels = source.open(index).region((0, 0, 14, 9), (14, 9)).pixels
        np.testing.assert_array_equal(pixels[:, :, 0], expected)


def test_jpeg_is_not_made_of_values_that_it_cannot_hold(tmp_path: Path) -> None:
    write_deep(tmp_path / "files")
    Image.fromarray(np.zeros((9, 14, 3), np.uint8)).save(tmp_path / "files/photo.png")
    (found,) = convert(tmp_path / "files", tmp_path / "shards", recode=RecodeConfig())
    said = "its values are {}, of which JPEG keeps 8 bits: without --size and --quality they are copied whole"
    assert found.bad == [
        (name, said.format("float32" if name.endswith(".npy") else "uint16"))
        for name in ("0.png", "1.npy", "2.tif", "3.npz")
    ]


def test_an_image_in_a_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_deep(tmp_path / "files")
    (tmp_path / "files/a.zarr").mkdir()
    with pytest.raises(
        UserError, match=r"'a\.zarr' is an image in a folder, which no shard can hold: data=folder"
    ):
        convert(tmp_path / "files", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_only_pointers_are_an_error(tmp_path: Path) -> None:
    write_pointers(tmp_path / "files", "1.jpg", "2.jpg")
    for recode in (None, RecodeConfig()):
        with pytest.raises(UserError, match=r"none of the 2 images can be read, .* pointer of Git LFS"):
            convert(tmp_path / "files", tmp_path / "shards", recode=recode)
        assert not (tmp_path / "shards").exists()


def test_an_evaluation_folder_of_one_class_keeps_its_label(tmp_path: Path) -> None:
    write_images(tmp_path / "files", ["train/ash/1.png", "train/elm/2.png", "val/elm/3.png"])
    convert(tmp_path / "files", tmp_path / "shards")
    source = open_one(ShardsConfig(root=str(tmp_path / "shards")), "eval")
    assert (source.classes, source.all_labels().tolist()) == (["elm"], [0])


def test_options_ask_for_recoding() -> None:
    assert from_options(size=None, quality=None) == PrepareConfig()
    assert from_options(size=7, quality=None).recode == RecodeConfig(size=7)
    assert from_options(size=None, quality=80).recode == RecodeConfig(quality=80)


def test_the_command_prints_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "files/train", plain_names(5))
    write_images(tmp_path / "files/val", plain_names(2))
    (tmp_path / "files/val/oak/001.png").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        main(["prepare", str(tmp_path / "files"), str(tmp_path / "shards"), "--size", "4", "--workers", "1"])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert "train: 5 images in 1 shard" in printed.out
    assert "val: 2 images in 1 shard" in printed.out
    assert "kept as it is: 'oak/001.png': " in printed.err
    index = json.loads((tmp_path / "shards/val/index.json").read_text())
    assert [name for name, _ in index["bad"]] == ["oak/001.png"]


def test_real_photographs_survive(real_images: Path, tmp_path: Path) -> None:
    files = open_one(FolderConfig(root=str(real_images / "imagenette")), "eval")
    lines = [f"{file}\t{files.name(i).split('/')[0]}\n" for i, file in enumerate(files.files) if i % 97 == 0]
    (tmp_path / "list.txt").write_text("".join(lines))
    for link in files.folder.iterdir():
        (tmp_path / link.name).symlink_to(link)
    convert(tmp_path / "list.txt", tmp_path / "shards")
    source = open_one(ShardsConfig(root=str(tmp_path / "shards")))
    assert len(source) == len(lines) > 30
    for index in range(len(source)):
        assert source.read(index) == files.read(97 * index)
        source.open(index).channels()
