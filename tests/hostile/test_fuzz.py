"""Mutations of recipes and of image files, for as many seconds as ETPP_FUZZ_SECONDS says (2 each by default).

A failure prints the seed of the one input that caused it: ETPP_FUZZ_SEED=N tries that one alone.
"""

from __future__ import annotations

import io
import os
import random
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile_images import BOMBS, ODD, encoded, noise, npy

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import UnreadableImage
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.folder import FileListConfig, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.views import EvalView, TrainView
from etpp_ssl.recipe import parse_any

SECONDS = float(os.environ.get("ETPP_FUZZ_SECONDS", 2))
RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
SIZE = (24, 32)


def seeds() -> Iterator[int]:
    """One after the other until the time is over; the first few always."""
    given = os.environ.get("ETPP_FUZZ_SEED")
    if given is not None:
        yield int(given)
        return
    end = time.monotonic() + SECONDS
    seed = 0
    while seed < 10 or time.monotonic() < end:
        yield seed
        seed += 1


VALUES = [
    "null", "true", "~", "-1", "0", "1e400", ".nan", "-.inf", "9" * 30, "9" * 60, "[]", "{}", "[1, 2]",
    "[[[[]]]]", "{name: x}", "{name: [1]}", "'\\0'", '"\\0"', '"\\ud800"', "&a x", "*a", "!!int 3", "!x y",
    "2001-01-01", "1:30", "0x10", "0o7", "x" * 5000, "é", "\u2028", "|\n  text", ">-\n  text", "? x", "- x",
    "name: vit", "folder", "{start: 0.1, end: 0.2}", "synthetic", "../..", "~nobody", "$HOME", "1_000", "+.5",
    "5e-4", "@x", "`x", "%x",
]  # fmt: skip
BYTES = ["\0", "\t", "\n", ":", "-", "[", "{", "}", "]", "'", '"', "#", "&", "*", "!", "|", ">", "%", "@",
         ",", "\ufeff", "\x85", "\udcff", "é", " ", "  "]  # fmt: skip

KEYS = ["seed", "model.name", "data", "curriculum.stages", "data.root", "model", "target.parts", "a.b.c"]


def mutated_text(text: str, draw: random.Random) -> str:
    """A few changes to lines, values or characters."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        lines = text.split("\n")
        place = draw.randrange(len(lines))
        line, way = lines[place], draw.randrange(8)
        key = line.partition(":")[0]
        if way < 3 and ":" in line:
            lines[place] = f"{key}: {draw.choice(VALUES)}"
        elif way == 3:
            lines[place] = draw.choice(["", " ", "  "]) + line.lstrip()
        elif way == 4:
            lines.insert(place, draw.choice(lines))
        elif way == 5:
            del lines[place]
        else:
            at = draw.randrange(len(line) + 1)
            lines[place] = line[:at] + draw.choice(BYTES) + line[at + draw.randrange(2) :]
        text = "\n".join(lines) or " "
    return text


def test_a_mutated_recipe_is_a_recipe_or_one_sentence() -> None:
    texts = [file.read_text() for file in RECIPES]
    refused = taken = 0
    for seed in seeds():
        draw = random.Random(f"recipe {seed}")
        text = draw.choice(texts)
        overrides = []
        if draw.random() < 0.3:
            overrides = [mutated_text(f"{draw.choice(KEYS)}={draw.choice(VALUES)}", draw)]
        if not overrides or draw.random() < 0.5:
            text = mutated_text(text, draw)
        try:
            recipe = parse_any(text, overrides)
            recipe.build_curriculum(1000)
            taken += 1
        except UserError as error:
            refused += 1
            if "\n" in str(error) or len(str(error)) > 1500:
                pytest.fail(f"ETPP_FUZZ_SEED={seed}: no short line: {str(error)[:3000]!r}")
        except Exception as error:
            pytest.fail(f"ETPP_FUZZ_SEED={seed}: {type(error).__name__}: {error} from {text!r} {overrides!r}")
    if "ETPP_FUZZ_SEED" not in os.environ:
        assert refused
        assert taken


def seed_files() -> list[tuple[str, bytes]]:
    """Small files of every format."""
    files = [
        (name, make()) for name, make in ODD.items() if not name.startswith(("wide", "tall", "profile.jpg"))
    ]
    files += [(name, make(40, 30)) for name, make in BOMBS.items()]
    picture = noise(size=(40, 30))
    for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "TGA", "PCX"):
        files.append((f"{form}.png", encoded(picture, form)))
    for name, options in (
        ("progressive.jpg", {"progressive": True}),
        ("gray.jpg", {}),
        ("lzw.tif", {"compression": "tiff_lzw"}),
        ("deflate.tif", {"compression": "tiff_adobe_deflate"}),
        ("jpeg.tif", {"compression": "jpeg"}),
        ("lossless.webp", {"lossless": True}),
    ):
        form = {"jpg": "JPEG", "tif": "TIFF", "webp": "WEBP"}[name.rpartition(".")[2]]
        files.append((name, encoded(picture.convert("L") if "gray" in name else picture, form, **options)))
    pages = [noise("L", seed=number) for number in range(5)]
    files.append(("pages.tif", encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    files.append(("words.npy", npy(np.zeros((9, 8, 3), np.uint16))))
    tifffile, imagecodecs = pytest.importorskip("tifffile"), pytest.importorskip("imagecodecs")
    words = np.random.default_rng(0).integers(0, 4096, (30, 40, 3), dtype=np.uint16)
    for number, options in enumerate(
        ({}, {"tile": (16, 16), "compression": "lzw"}, {"compression": "jpeg2000"})
    ):
        file = io.BytesIO()
        tifffile.imwrite(file, words, photometric="rgb", **options)
        files.append((f"words-{number}.tif", file.getvalue()))
    files.append(("words.jp2", imagecodecs.jpeg2k_encode(words, reversible=True, bitspersample=12)))
    return files


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """A few changes, most of them where the header is."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 4, 16])):
        reach = min(len(changed), draw.choice([16, 64, 256, len(changed)])) or 1
        place, way = draw.randrange(reach), draw.randrange(7)
        if way <= 1:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif way == 2:
            changed[place : place + 1] = bytes(
                [(changed[place] if changed else 0) ^ (1 << draw.randrange(8))]
            )
        elif way == 3:
            width = draw.choice([2, 4])
            value = draw.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 30_000])
            order = draw.choice(["big", "little"])
            changed[place : place + width] = (value & (256**width - 1)).to_bytes(width, order)
        elif way == 4:
            del changed[place : place + draw.choice([1, 4, 100])]
        elif way == 5:
            changed[place:place] = changed[place : place + draw.choice([1, 8, 200])]
        else:
            del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def opened(folder: Path, kind: str, in_chans: int) -> ImageSource:
    """The images of a folder, by way of one of the sources."""
    options = {"in_chans": in_chans, "image_size": SIZE, "seed": 0}
    files = sorted((folder / "images").iterdir())
    if kind == "folder":
        return FolderConfig(root=str(folder / "images")).open("train", **options)
    if kind == "list":
        (folder / "list.txt").write_text("\n".join(f"images/{file.name}" for file in files))
        return FileListConfig(file=str(folder / "list.txt")).open("train", **options)
    (folder / "tars").mkdir(exist_ok=True)
    with tarfile.open(folder / "tars" / "1.tar", "w") as tar:
        for file in files:
            tar.add(file, file.name)
    return ShardsConfig(root=str(folder / "tars")).open("train", **options)


def test_a_mutated_image_is_a_picture_or_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("simplejpeg")
    common = {"image_size": SIZE, "crop_scale": (0.2, 1.0), "flip": True, "lanczos": False, "seed": 3}
    views = [
        EvalView(SIZE, 0.875),
        TrainView(**common, decode="full"),
        TrainView(**common, decode="reduced"),
        TrainView(**common, decode="reduced", decoder="simplejpeg"),
    ]
    (tmp_path / "images").mkdir()
    originals = seed_files()
    refused = taken = 0
    for seed in seeds():
        draw = random.Random(f"image {seed}")
        name, data = draw.choice(originals)
        suffix = draw.choice([".jpg", ".png", ".npy", Path(name).suffix])
        file = tmp_path / "images" / f"x{suffix}"
        file.write_bytes(mutated_bytes(data, draw))
        in_chans = draw.choice([3, 3, 3, 1, 4, 5])
        try:
            source = opened(tmp_path, draw.choice(["folder", "list", "shards"]), in_chans)
            for view in views:
                shown = view(source.open(0), 7, (12, 16))
                assert shown.shape[0] == in_chans, shown.shape
            taken += 1
        except UnreadableImage as error:
            refused += 1
            if "\n" in str(error) or not str(error):
                pytest.fail(f"ETPP_FUZZ_SEED={seed}: no line: {str(error)!r}")
        except Exception as error:
            pytest.fail(f"ETPP_FUZZ_SEED={seed}: {type(error).__name__}: {error} from {name}")
        file.unlink()
    assert not [str(warning.message) for warning in recwarn.list]
    if "ETPP_FUZZ_SEED" not in os.environ:
        assert refused
        assert taken


def test_a_mutated_tar_is_a_source_or_one_sentence(tmp_path: Path) -> None:
    """No time box: a hundred of them, since headers are few and small."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in (("a.png", encoded(noise(), "PNG")), ("é" * 60 + ".png", b"x"), ("b.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    refused = 0
    for seed in range(100):
        draw = random.Random(f"tar {seed}")
        (tmp_path / "1.tar").write_bytes(mutated_bytes(buffer.getvalue(), draw))
        try:
            source = ShardsConfig(root=str(tmp_path)).open("train", in_chans=3, image_size=SIZE, seed=0)
            for index in range(len(source)):
                source.open(index)
        except (UserError, UnreadableImage) as error:
            refused += 1
            if "\n" in str(error):
                pytest.fail(f"tar {seed}: no line: {str(error)!r}")
    assert refused
