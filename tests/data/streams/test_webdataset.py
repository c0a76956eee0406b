"""WebDataset tars: every kind of URL, what counts as a sample, and damage of every kind."""

from __future__ import annotations

import gzip
import io
import shlex
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from stream_sources import SHARD_SIZES, png, write_tar, write_tars
from webdataset.tariterators import tarfile_samples

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data.streams import worker_shards
from etpp_ssl.data.streams.base import Item
from etpp_ssl.data.streams.webdataset import WebDatasetConfig, find_tars
from etpp_ssl.data.streams.worker_shards import read_patiently


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_shards, "RETRY_SECONDS", 0.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serves the folder `tars` of the test's folder; gives its address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *values: Any) -> None:
            pass

    (tmp_path / "tars").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "tars"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def items_of(url: object, offset: int = 0, retries: int = 0, **settings: Any) -> list[Item]:
    reader = WebDatasetConfig(urls=str(url), num_images=1, **settings).open_reader()
    assert len(reader.names) == 1
    return list(read_patiently(partial(reader.read, 0), offset, retries=retries, name=str(reader.names[0])))


def labels_of(url: object, **settings: Any) -> list[int]:
    return [item.label for item in items_of(url, **settings)]


def test_urls_of_every_kind_give_the_same_samples(tmp_path: Path, server: str) -> None:
    file = write_tar(tmp_path / "tars" / "0.tar", range(5))
    (tmp_path / "tars" / "1.tar.gz").write_bytes(gzip.compress(file.read_bytes()))
    expected = [(png(number), number) for number in range(5)]
    for url in (
        file,
        f"file:{file}",
        f"pipe:cat {shlex.quote(str(file))}",
        f"{server}/0.tar",
        tmp_path / "tars" / "1.tar.gz",
        f"{server}/1.tar.gz",
    ):
        found = items_of(url)
        assert [(item.data, item.label) for item in found] == expected
        assert [item.name for item in found] == [f"{url} :: img/{number:03d}" for number in range(5)]
        assert items_of(url, offset=3) == found[3:]


def test_a_pipe_that_is_not_read_to_its_end_is_closed_without_a_word(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", range(300))
    reader = WebDatasetConfig(urls=f"pipe:cat {file}", num_images=1).open_reader()
    found = reader.read(0, 0)
    assert next(found).label == 0
    del found


def test_samples_are_those_of_the_library(tmp_path: Path) -> None:
    names = {
        "a/0.png": png(0), "a/0.cls": b"7", "a/0.seg.png": b"mask", "b/0.PNG": png(1), "b/0.cls": b"8\n",
        "__meta__/x.png": b"?", "__info__": b"?", "c.json": b"{}", "c.png": png(2), "README": b"none",
        "d.x.jpg": b"other", "d.cls": b"9", "e.cls": b"10", "e.jpeg": png(3),
    }  # fmt: skip
    file = tar_of(tmp_path / "0.tar", names)
    library = [
        sample
        for sample in tarfile_samples(iter([{"url": str(file)}]))
        if any(key in sample for key in ("png", "jpeg"))
    ]
    found = [item for item in items_of(file) if not item.fault]
    assert [item.name.split(" :: ")[1] for item in found] == [sample["__key__"] for sample in library]
    assert [item.data for item in found] == [sample.get("png") or sample["jpeg"] for sample in library]
    assert [item.label for item in found] == [7, 8, -1, 10]
    (missing,) = [item for item in items_of(file) if item.fault]
    assert missing.name == f"{file} :: d"
    assert missing.fault == "it has no file of jpg, jpeg, png, webp"


def test_keys_say_what_is_an_image_and_what_a_label(tmp_path: Path) -> None:
    file = tar_of(tmp_path / "0.tar", {"0.png": b"a", "0.webp": b"b", "0.txt": b"4", "0.cls": b"oak"})
    (item,) = items_of(file, image_keys=("webp", "png"), label_key="txt")
    assert (item.data, item.label) == (b"b", 4)
    assert [labels_of(file, label_key=key) for key in (None, "cls", "no")] == [[-1], ["oak"], [-1]]


@pytest.mark.parametrize(
    ("stored", "label"),
    [
        ('{"label": 7, "caption": "a tree"}', 7),
        ('{"label": "oak"}', "oak"),
        ('{"label": " 7 "}', "7"),
        ('{"label": 7.0}', 7),
        ('{"label": true}', 1),
        ('{"label": [1, 2]}', -1),
        ('{"label": null}', -1),
        ('{"caption": "a tree"}', -1),
        ("7", 7),
        ('"oak"', "oak"),
        ("not json", -1),
        ("[" * 100_000, -1),
    ],
)
def test_labels_in_json(stored: str, label: int | str, tmp_path: Path) -> None:
    """`label_key=json` was "no label"."""
    file = tar_of(tmp_path / "0.tar", {"0.png": png(0), "0.json": stored.encode()})
    assert labels_of(file, label_key="json") == [label]
    other = tar_of(tmp_path / "1.tar", {"0.png": png(0), "0.json": stored.replace("label", "kind").encode()})
    assert labels_of(other, label_key="json", label_field="kind") == [label]


@pytest.mark.parametrize("keep", [700, 1024, 1600, 2048, 2560, 5000, 9000])
def test_a_tar_that_ends_early_gives_what_is_whole_and_says_where(keep: int, tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar", range(4))
    expected = items_of(whole)
    cut = tmp_path / "1.tar"
    cut.write_bytes(whole.read_bytes()[:keep])
    *found, last = items_of(cut)
    assert [(item.data, item.label) for item in found] == [
        (item.data, item.label) for item in expected[: len(found)]
    ]
    assert last.name == f"{cut} :: img/{len(found):03d}" or keep % 512 == 0
    assert last.fault.startswith("the tar is damaged or ends early here (")
    # Nothing that is whole is lost: an image and its label take at most 3584 bytes here.
    assert len(found) >= keep // 3584 - 1


def test_damage_in_the_middle_is_no_end(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "0.tar", range(4))
    content = bytearray(whole.read_bytes())
    with tarfile.open(whole) as tar:
        header = tar.getmember("img/002.png").offset
    content[header : header + 100] = b"\xff" * 100
    broken = tmp_path / "1.tar"
    broken.write_bytes(content)
    found = items_of(broken)
    # The label of 001 may be what is missing.
    assert [item.label for item in found] == [0, -1]
    assert found[1].fault
    # The same through a pipe that has more to say than is read, and compressed.
    assert [item.label for item in items_of(f"pipe:cat {broken}")] == [0, -1]
    packed = tmp_path / "2.tar.gz"
    packed.write_bytes(gzip.compress(bytes(content)))
    assert [item.label for item in items_of(packed)] == [0, -1]
    packed.write_bytes(gzip.compress(whole.read_bytes())[:3000])
    assert [bool(item.fault) for item in items_of(packed)][-1]


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 5000, png(0) * 3])
def test_what_is_no_tar_is_one_sentence_with_its_url(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(RunFault, match=r"0\.tar' cannot be read after 2 tries \(ReadError") as error:
        items_of(tmp_path / "0.tar", retries=1)
    assert "\n" not in str(error.value)


def test_a_url_that_cannot_be_opened_is_one_sentence(tmp_path: Path, server: str) -> None:
    for url in (
        f"{server}/no.tar",
        f"pipe:cat {tmp_path}/no.tar 2>/dev/null",
        "ftp://x/0.tar",
        "s3://b/0.tar",
    ):
        with pytest.raises(RunFault, match="cannot be read after 1 try") as error:
            items_of(url)
        assert repr(url) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_command_that_fails_in_the_middle_is_run_again(tmp_path: Path) -> None:
    file = write_tar(tmp_path / "0.tar", range(5))
    # The first time it gives 6000 bytes and fails, which is no damage of the tar.
    command = (
        f"cd {tmp_path}; if [ -e tried ]; then cat {file}; else touch tried; head -c 6000 {file}; exit 3; fi"
    )
    assert labels_of(f"pipe:{command}", retries=1) == list(range(5))
    with pytest.raises(RunFault, match="exit code 3 of what reads it"):
        items_of(f"pipe:head -c 6000 {file}; exit 3", retries=1)
    # It says so only after its last byte.
    with pytest.raises(RunFault, match="exit code 4"):
        items_of(f"pipe:head -c 6000 {file}; exec >&-; sleep 0.3; exit 4")


def test_folders_patterns_and_lists_are_found_in_a_fixed_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tars(tmp_path / "tars")
    (folder / "notes.txt").write_text("no tar")
    expected = [str(folder / f"{number}.tar") for number in range(len(SHARD_SIZES))]
    monkeypatch.setenv("TARS", str(folder))
    for pattern in (str(folder), f"{folder}/*.tar", f"{folder}/{{0..6}}.tar", "$TARS", "$TARS/?.tar"):
        assert find_tars(pattern) == expected
    assert find_tars("http://a/{00..02}.tar") == [f"http://a/0{number}.tar" for number in range(3)]
    assert find_tars("pipe:aws s3 cp s3://b/{1..2}.tar -") == [
        f"pipe:aws s3 cp s3://b/{number}.tar -" for number in (1, 2)
    ]
    both = WebDatasetConfig(urls=(f"{folder}/{{4..5}}.tar", "http://a/0.tar"), num_images=1).open_reader()
    assert both.names == [*expected[4:6], "http://a/0.tar"]


@pytest.mark.parametrize("key", ["urls", "image_keys"])
def test_an_empty_list_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="it is empty"):
        WebDatasetConfig.model_validate({"urls": "x", "num_images": 1, key: []})


def test_missing_tars_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pattern, words in (
        (f"{tmp_path}/{{0..2}}.tar", "0.tar' does not exist"),
        (f"{tmp_path}/nowhere", "nowhere' does not exist"),
        (f"{tmp_path}/empty", "has no tar"),
        (f"{tmp_path}/empty/*.tar", "has no tar"),
    ):
        with pytest.raises(UserError, match=words) as error:
            find_tars(pattern)
        assert str(error.value).startswith("data.urls ")


def test_without_the_library_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(UserError, match=r"data\.name webdataset needs .* pip install 'etpp-ssl\[stream\]'"):
        WebDatasetConfig(urls="http://a/0.tar", num_images=1).open_stream(0)
