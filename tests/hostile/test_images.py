"""What an image file claims is checked before it is decoded; odd ones are pictures, hostile ones one line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hostile_images import BOMBS, ODD, animated, encoded, jpeg_of, noise
from PIL import Image

from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.formats import decode, open_picture
from etpp_ssl.data.formats.base import Decoder, Reading, UnreadableImage
from etpp_ssl.data.formats.pillow import MAX_SCANS, from_picture
from etpp_ssl.data.shard_writer import RecodeConfig
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.views import EvalView, TrainView
from etpp_ssl.report.viewer import images_of_files

SIZE = (24, 32)
DECODERS: tuple[Decoder, ...] = ("pillow", "simplejpeg")


def views() -> list[TrainView | EvalView]:
    common = {"image_size": SIZE, "crop_scale": (0.2, 1.0), "flip": True, "lanczos": False, "seed": 3}
    reduced = [TrainView(**common, decode="reduced", decoder=decoder) for decoder in DECODERS]
    return [TrainView(**common, decode="full"), *reduced, EvalView(SIZE, 0.875)]


def refusal(data: bytes, in_chans: int = 3, **limits: int) -> str:
    with pytest.raises(UnreadableImage) as caught:
        open_picture(data, Reading(in_chans, **limits))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_picture_is_a_picture_in_every_view(name: str, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("simplejpeg")
    for view in views():
        shown = view(open_picture(ODD[name](), Reading(3)), 5, (12, 16))
        assert shown.shape[0] == 3
        assert shown.shape[1] <= SIZE[0]
    assert not recwarn.list


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_shown(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    shown = EvalView(SIZE, 1.0)(open_picture(animated(form, **options), Reading(3)), 0, SIZE)
    assert (shown[0] == 255).all()
    assert (shown[1:] == 0).all()


def test_cmyk_is_taken_for_photoshops_inverted_kind_whether_it_says_so_or_not() -> None:
    marked = encoded(noise("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in marked
    assert b"Adobe" not in ODD["cmyk-unmarked.jpg"]()
    one, other = (np.asarray(decode(data, Reading(3))[0]) for data in (marked, ODD["cmyk-unmarked.jpg"]()))
    np.testing.assert_array_equal(one, other)
    wanted = np.asarray(noise("CMYK").convert("RGB")).astype(int)
    assert np.abs(one - wanted).mean() < 20


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_claims_much_is_refused_before_it_is_decoded(name: str) -> None:
    data = BOMBS[name](30_000, 30_000)
    assert len(data) < 20_000
    tracemalloc.start()
    try:
        for in_chans in (1, 3, 5):
            reason = refusal(data, in_chans)
            with pytest.raises(UnreadableImage):
                decode(data, Reading(in_chans))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert "data.max_pixels" in reason
    # Pillow's own limit is twice ours.
    between = BOMBS[name](15_000, 15_000)
    assert "claims 15,000 x 15,000 pixels, more than data.max_pixels 178,956,970" in refusal(between)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_no_bomb_takes_memory_where_python_does_not_see_it(tmp_path: Path) -> None:
    for other, make in BOMBS.items():
        (tmp_path / other).write_bytes(make(30_000, 30_000))
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from etpp_ssl.data.formats.base import Reading, UnreadableImage\n"
        "from etpp_ssl.data.formats import open_picture\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "files = [file.read_bytes() for file in Path(sys.argv[1]).iterdir()]\n"
        "refused = 0\n"
        "for data in [b'nothing', *files]:\n"
        "    before = peak()\n"
        "    try: open_picture(data, Reading(3))\n"
        "    except UnreadableImage: refused += 1\n"
        "    grown = peak() - before\n"
        "    assert data == b'nothing' or grown < 50_000, (data[:8], grown)\n"
        "print(refused)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(BOMBS) + 1)


def test_the_limit_is_a_setting_of_every_way_in(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, width in (("a.jpg", 40), ("b.png", 50), ("c.jpg", 60)):
        (images / name).write_bytes(encoded(noise(size=(width, 10)), "JPEG" if name[2] == "j" else "PNG"))
    source = FolderConfig(root=str(images), max_pixels=500).open("train", in_chans=3, image_size=SIZE, seed=0)
    assert source.open(1).size == (50, 10)
    with pytest.raises(UnreadableImage, match=r"60 x 10 pixels, more than data\.max_pixels 500"):
        source.open(2)
    with pytest.raises(UnreadableImage, match=r"data\.max_pixels 500"):
        from_picture(noise(size=(51, 10)), Reading(3, 500))
    (images / "b.png").write_bytes(bytes((1 << 26) + 10_000))
    with pytest.raises(UnreadableImage, match="its 67,118,864 bytes are more than"):
        source.read(1)
    (images / "b.png").unlink()
    for recode in (None, RecodeConfig(size=8)):
        config = PrepareConfig(recode=recode, skip_bad=True, max_pixels=500)
        (split,) = prepare(images, tmp_path / f"shards-{recode is None}", config, lambda done, total: None)
        assert [name for name, _ in split.bad] == ["c.jpg"]
        assert "data.max_pixels 500" in split.bad[0][1]


def test_a_page_of_a_tiff_cannot_be_larger_than_the_first() -> None:
    pages = [noise("L"), noise("L", size=(4_000, 5))]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImage, match="4,000 x 5 pixels"):
        decode(data, Reading(2, 10_000))


def test_many_pages_are_not_counted_to_the_end() -> None:
    pages = [Image.new("L", (1, 1))] * 300
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert refusal(data, 5) == "it has 105 pages or more, but in_chans is 5"
    assert decode(data, Reading(3))[0].size == (1, 1)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    data = encoded(noise(size=(200, 100)), "JPEG", progressive=True)
    start, end = data.index(b"\xff\xda"), data.rindex(b"\xff\xd9")
    assert open_picture(data, Reading(3)).size == (200, 100)
    scans = data[start:end] * (MAX_SCANS + 1)
    reason = refusal(data[:start] + scans + data[end:])
    assert reason.endswith(f"more than {MAX_SCANS}")


def test_a_program_that_calls_itself_a_picture_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands PostScript to Ghostscript, wherever it finds it."""
    mark = tmp_path / "executed"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 23 14\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    try:
        with Image.open(io.BytesIO(script)) as picture:
            picture.load()
    except OSError:
        pass
    assert mark.exists(), "Pillow would run it"
    mark.unlink()
    assert refusal(script) == "it is in no known image format"
    assert not mark.exists()


def test_a_strip_is_not_blown_up() -> None:
    """Resized to cover the crop, 30,000 x 1 pixels would be two thousand million."""
    strip = open_picture(encoded(noise(size=(30_000, 1)), "PNG"), Reading(3))
    tracemalloc.start()
    try:
        shown = EvalView((224, 192), 0.875)(strip, 0, (224, 192))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shown.shape == (3, 224, 192)
    assert peak < 50e6
    # Every row is the same row of the picture, and it is the middle that is shown.
    assert (shown - shown[:, :1]).abs().max() <= 1


@pytest.mark.parametrize("name", ["bomb.jpg", "bomb.png"])
def test_reconstruct_names_the_file_that_it_cannot_show(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BOMBS[name](30_000, 30_000))
    with pytest.raises(UserError, match=f"image '.*{name}' cannot be read: it claims more pixels"):
        images_of_files([tmp_path / name], 1, view=EvalView(SIZE, 1.0), reading=Reading(3))


def test_what_simplejpeg_would_decode_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")

    def decode_jpeg(*args: object, **options: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    data = jpeg_of(3_000, 2_000)
    assert "claims 3,000 x 2,000" in refusal(data, max_pixels=5_999_999)
    picture = open_picture(data, Reading(3, 6_000_000))
    with pytest.raises(AssertionError, match="it was asked"):
        picture.region((0, 0, 3_000, 2_000), (300, 200), "simplejpeg")
