"""Files that are opened by their path: only what is asked for is read, and only of what is a file."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from etpp_ssl.data.formats import open_file, open_picture
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage, level_for
from etpp_ssl.data.formats.values import extremes

RANGE = ((0.0, 4000.0),)


def whole(picture: Picture) -> np.ndarray:
    return picture.region((0, 0, *picture.size), picture.size).pixels


def test_a_mapped_array_is_the_one_that_is_read_whole(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "a.npy"
    for dtype in ("u1", "<u2", ">u2", "<i4", ">f4", "<f8"):
        for axes, shape in ((None, (13, 17, 3)), ("chw", (3, 13, 17)), ("cwh", (3, 17, 13))):
            for order in "CF":
                for channels in (None, (2, 0, 2)):
                    array = np.asarray(rng.integers(0, 200, shape), dtype=dtype, order=order)
                    np.save(path, array)
                    reading = Reading(3, range=RANGE, axes=axes, channels=channels)
                    mapped, read = open_file(path, reading), open_picture(path.read_bytes(), reading)
                    assert mapped.size == read.size == (17, 13)
                    np.testing.assert_array_equal(whole(mapped), whole(read))
                    expected = array.transpose([(axes or "hwc").index(axis) for axis in "hwc"])
                    expected = expected[2:9, 3:17, [*(channels or (0, 1, 2))]].astype(np.float32)
                    np.testing.assert_array_equal(mapped.region((3, 2, 17, 9), (1, 1)).pixels, expected)


def test_two_axes_are_one_channel(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int16).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    picture = open_file(tmp_path / "a.npy", Reading(1, range=RANGE))
    np.testing.assert_array_equal(whole(picture)[:, :, 0], array)


def sparse(path: Path, shape: tuple[int, ...], end: bytes) -> None:
    """A .npy of zeros that takes no room on the disk, and ends with some bytes."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"shape": shape, "fortran_order": False, "descr": np.dtype("<u2").str}
        )
        file.truncate(file.tell() + 2 * int(np.prod(shape)))
        file.seek(-len(end), os.SEEK_END)
        file.write(end)


def test_of_a_file_larger_than_the_memory_a_part_is_read(tmp_path: Path) -> None:
    sparse(tmp_path / "large.npy", (200_000, 500_000, 2), np.array([7, 9], "<u2").tobytes())
    reading = Reading(2, range=RANGE)
    picture = open_file(tmp_path / "large.npy", reading, in_parts=True)
    assert picture.size == (500_000, 200_000)
    pixels = picture.region((499_998, 199_999, 500_000, 200_000), (1, 1)).pixels
    np.testing.assert_array_equal(pixels, [[[0, 0], [7, 9]]])
    with pytest.raises(UnreadableImage, match=r"bytes are more than"):
        open_file(tmp_path / "large.npy", reading)


def test_a_file_whose_parts_are_not_asked_for_has_the_usual_limit(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 30, 40), np.uint16))
    reading = Reading(3, range=RANGE, axes="chw", max_pixels=1199)
    with pytest.raises(UnreadableImage, match=r"40 x 30 pixels, more than data.max_pixels 1,199"):
        open_file(tmp_path / "a.npy", reading)
    assert open_file(tmp_path / "a.npy", reading, in_parts=True).size == (40, 30)
    # One that is read whole keeps it.
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"data.max_pixels 1,199"):
        open_file(tmp_path / "a.png", Reading(1, range=RANGE, max_pixels=1199), in_parts=True)


@pytest.mark.parametrize("reading", [Reading(1), Reading(1, range=RANGE)])
@pytest.mark.parametrize("in_parts", [False, True])
def test_what_is_no_file_is_a_sentence_and_no_wait(reading: Reading, in_parts: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "cut.npy", np.zeros((9, 9), np.uint8))
    os.truncate(tmp_path / "cut.npy", 150)
    np.save(tmp_path / "empty.npy", np.zeros((0, 9), np.uint8))
    np.save(tmp_path / "deep.npy", np.zeros((2, 2, 2, 2), np.uint8))
    np.save(tmp_path / "words.npy", np.array([["a"]], dtype=object))
    for name, reason in {
        "pipe.npy": "it is a named pipe, not a file",
        "/dev/zero": "it is a device, not a file",
        "folder.npy": "Is a directory|IsADirectoryError",
        "nothing.npy": "No such file or directory",
        "null\0.npy": "null",
        "short.npy": "header is damaged or incomplete",
        "cut.npy": r"its values take 81 bytes, but it has 22",
        "empty.npy": r"shape is \(0, 9\)",
        "deep.npy": r"shape is \(2, 2, 2, 2\)",
        "words.npy": "[Pp]ickle|object|dtype",
    }.items():
        with pytest.raises(UnreadableImage, match=reason) as error:
            open_file(str(tmp_path / name), reading, in_parts=in_parts)
        assert "\n" not in str(error.value)


def test_eight_bits_are_read_as_ever(tmp_path: Path) -> None:
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.save(tmp_path / "a.npy", array)
    picture = open_file(tmp_path / "a.npy", Reading(3))
    assert not picture.deep
    np.testing.assert_array_equal(np.asarray(picture.channels()[0]), array)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_files_size_is_known_before_it_is_decoded(orientation: int) -> None:
    values = np.arange(15, dtype=np.uint16).reshape(3, 5) * 1000
    file, exif = io.BytesIO(), Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
    Image.fromarray(values).save(file, "PNG", exif=exif)
    reading = Reading(1, range=((0.0, 65535.0),))
    picture = open_picture(file.getvalue(), reading)
    turned = {1: values, 3: values[::-1, ::-1], 6: values[::-1].T}[orientation]
    assert picture.size == turned.shape[::-1]
    np.testing.assert_array_equal(whole(picture)[:, :, 0], turned)
    # Where the file tells of it behind its pixels, too.
    start = file.getvalue().find(b"eXIf") - 4
    end = start + 12 + int.from_bytes(file.getvalue()[start : start + 4], "big") if start > 0 else 0
    if end:
        moved = file.getvalue()[:start] + file.getvalue()[end:-12] + file.getvalue()[start:end]
        behind = open_picture(moved + file.getvalue()[-12:], reading)
        assert behind.size == turned.shape[::-1]
        np.testing.assert_array_equal(whole(behind)[:, :, 0], turned)
    assert (end > 0) == (orientation > 1)
    cut = open_picture(file.getvalue()[:-30], reading)
    assert cut.size == picture.size
    with pytest.raises(UnreadableImage):
        whole(cut)


def test_a_png_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(np.arange(15, dtype=np.uint16).reshape(3, 5)).save(file, "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    picture = open_picture(file.getvalue(), Reading(1, range=((0.0, 65535.0),)))
    np.testing.assert_array_equal(whole(picture)[:, :, 0], np.arange(15).reshape(3, 5))


def test_the_smallest_copy_serves_that_keeps_what_it_must() -> None:
    levels = ((1000, 600), (500, 300), (250, 150), (125, 75))
    box = (100, 200, 501, 601)
    wanted = (((401, 401), 0), ((201, 10), 0), ((200, 200), 1), ((100, 101), 1), ((50, 50), 3))
    for at_least, number in wanted:
        expected = (number, tuple(side / 2**number for side in box))
        assert level_for(levels, box, at_least) == expected
        # Whatever the order of the copies.
        found, part = level_for((levels[0], *levels[:0:-1]), box, at_least)
        assert (-found % 4, part) == expected
    assert level_for(levels[:1], box, (1, 1)) == (0, box)
    # Sides that do not divide: the copy shows all of the picture.
    assert level_for(((1001, 601), (501, 301)), (0, 0, 1001, 601), (400, 300)) == (1, (0, 0, 501, 301))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (8, 8, 3), (9, 7, 12), (40, 33, 5)])
def test_extremes_are_those_of_each_channel(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(size=shape).astype(np.float32)
        for laid in (values, values[::-1], np.asfortranarray(values)):
            np.testing.assert_array_equal(extremes(laid), (laid.min(axis=(0, 1)), laid.max(axis=(0, 1))))
    values[-1, -1, -1] = np.nan
    assert [np.isnan(found[-1]) for found in extremes(values)] == [True, True]
    assert not np.isnan([found[:-1] for found in extremes(values)]).any()
