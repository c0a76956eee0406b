"""Weights from elsewhere: nothing in them runs, none unpacks to more than it is, and NaN is no start."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.weights.official import load_official_mae
from etpp_ssl.weights.reading import read_state_dict

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def tensors(tiny_recipe: Callable[..., Recipe]) -> dict[str, torch.Tensor]:
    """All of a model."""
    torch.manual_seed(0)
    model: MaskedAutoencoder = tiny_recipe().build_model()
    return model.state_dict()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    return line


@pytest.mark.parametrize("old", [False, True])
def test_a_payload_is_refused_through_every_way_in(
    old: bool,
    tensors: dict[str, torch.Tensor],
    tiny_recipe: Callable[..., Recipe],
    tiny_classifier: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mark, file = tmp_path / "executed", tmp_path / "folder" / "model.pth"
    file.parent.mkdir()
    content = {"model": tensors, "args": Payload(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    torch.load(file, weights_only=False)
    assert mark.exists(), "the payload would work"
    mark.unlink()

    tiny_recipe().save(tmp_path / "pretrain.yaml")
    tiny_classifier().save(tmp_path / "finetune.yaml")
    said = [refusal(file)]
    with pytest.raises(UserError) as caught:
        load_official_mae(file)
    said.append(str(caught.value))
    for init in (file, file.parent):
        for task in ("pretrain", "finetune"):
            said.append(command(capsys, task, str(tmp_path / f"{task}.yaml"), f"init={init}"))
        recipe = [str(tmp_path / "pretrain.yaml"), f"init={init}"]
        said.append(command(capsys, "probe", *recipe, "probe=knn"))
        said.append(command(capsys, "embed", *recipe, "--out", str(tmp_path / "out.safetensors")))
    for sentence in said:
        assert "was refused and nothing in it was run: its pickle asks for " in sentence
    assert not mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetune.yaml", "folder", "pretrain.yaml"]


def test_a_bare_pickle_and_one_under_another_name_are_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Payload(mark), protocol))
        refusal(tmp_path / "x.safetensors")
    assert not mark.exists()


def repacked(
    path: Path, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> Path:
    """A file of torch.save with other contents."""
    torch.save({"model": TENSORS}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, change(name, content))
    return path


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    def blow_up(name: str, content: bytes) -> bytes:
        return bytes(50_000_000) if name.endswith("/data/0") else content

    bomb = repacked(tmp_path / "bomb.pth", blow_up, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    assert "claims to hold 50," in refusal(bomb)


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_asks_for_gigabytes_of_zeros_is_refused(old: bool, tmp_path: Path) -> None:
    zeros = b"cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R"
    content = b"\x80\x02](" + zeros * 3 + b"e."
    path = tmp_path / "x.pth"
    if old:
        whole = io.BytesIO()
        torch.save([], whole, _use_new_zipfile_serialization=False)
        data = whole.getvalue()
        start = data.rindex(b"\x80\x02]")
        path.write_bytes(data[:start] + content)
    else:
        repacked(path, lambda name, found: content if name.endswith("data.pkl") else found)
    assert "its pickle asks for bytearray" in refusal(path)


def test_any_cut_is_one_sentence(tmp_path: Path) -> None:
    torch.save({"model": TENSORS}, tmp_path / "whole.pth")
    save_file(TENSORS, tmp_path / "whole.safetensors")
    for whole in (tmp_path / "whole.pth", tmp_path / "whole.safetensors"):
        content = whole.read_bytes()
        for share in range(20):
            (tmp_path / "cut").write_bytes(content[: len(content) * share // 20])
            refusal(tmp_path / "cut")


def safetensors(header: Any, values: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "length beyond the file": safetensors({"a": entry(0, 64, [16])}, length=10_000),
    "length beyond everything": safetensors({"a": entry(0, 64, [16])}, length=2**64 - 1),
    "length of half": safetensors({"a": entry(0, 64, [16])}, length=20),
    "no JSON": safetensors(b"{not json"),
    "deep JSON": safetensors(b"[" * 100_000),
    "no UTF-8": safetensors(b"\xff\xfe{}"),
    "a list": safetensors([1, 2]),
    "no tensor": safetensors({}, b""),
    "overlap": safetensors({"a": entry(0, 64, [16]), "b": entry(32, 64, [8])}),
    "a gap": safetensors({"a": entry(0, 16, [4]), "b": entry(32, 64, [8])}),
    "beyond the end": safetensors({"a": entry(0, 640, [160])}),
    "backwards": safetensors({"a": entry(64, 0, [16])}),
    "negative": safetensors({"a": entry(-64, 0, [16])}),
    "wrong shape": safetensors({"a": entry(0, 64, [17])}),
    "overflowing shape": safetensors({"a": entry(0, 64, [2**62, 2**62])}),
    "negative shape": safetensors({"a": entry(0, 64, [-4, -4])}),
    "unknown dtype": safetensors({"a": entry(0, 64, [16], "F33")}),
    "left over": safetensors({"a": entry(0, 32, [8])}),
    "complex": safetensors({"a": entry(0, 64, [8], "C64")}),
    "text in the metadata": safetensors({"__metadata__": {"a": 1}, "a": entry(0, 64, [16])}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_wrong_safetensors_header_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(HEADERS[name])
    refusal(tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_weights_that_are_no_numbers_are_refused_by_name(
    form: str,
    value: float,
    tensors: dict[str, torch.Tensor],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors["encoder.blocks.0.mlp.fc1.bias"][1:3] = value
    file = tmp_path / f"w.{form}"
    torch.save(tensors, file) if form == "pth" else save_file(tensors, file)
    words = (
        "holds NaN or infinity, and no run can start from it: encoder.blocks.0.mlp.fc1.bias (2 of 64 values)"
    )
    assert words in refusal(file)
    tiny_recipe().save(tmp_path / "r.yaml")
    assert words in command(capsys, "pretrain", str(tmp_path / "r.yaml"), f"init={file}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="the state dict holds NaN or infinity"):
        load_official_mae({name.removeprefix("encoder."): tensor for name, tensor in tensors.items()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("encoder.blocks.0.norm1.bias"), "encoder.blocks.0.norm1.bias is missing"),
        (lambda t: t.update(more=torch.ones(1)), "more is not part of the model"),
        (lambda t: t.update({"encoder.norm.bias": torch.ones(17)}), "encoder.norm.bias is (17,)"),
        (lambda t: t.update({"encoder.norm.bias": torch.ones(16, dtype=torch.int64)}), "is int64"),
        (lambda t: [t.pop(name) for name in list(t) if "fc" in name], "is missing"),
        (lambda t: t.clear() or t.update(x=torch.ones(1)), "another architecture"),
    ],
    ids=["missing", "too many", "shape", "dtype", "many missing", "nothing of it"],
)
def test_tensors_of_another_model_are_named(
    change: Callable[[dict[str, torch.Tensor]], object],
    words: str,
    tensors: dict[str, torch.Tensor],
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    tiny_recipe().save(tmp_path / "r.yaml")
    line = command(capsys, "pretrain", str(tmp_path / "r.yaml"), f"init={tmp_path / 'w.safetensors'}")
    assert words in line
    assert not (tmp_path / "run").exists()


def test_the_same_tensors_unchanged_are_taken(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "w.safetensors")
    read = read_state_dict(tmp_path / "w.safetensors")
    assert read.keys() == load_file(tmp_path / "w.safetensors").keys() == tensors.keys()


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.pth")
    for path, words in (
        (tmp_path / "pipe.pth", "it is a named pipe"),
        (Path("/dev/zero"), "it is a device"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(UserError, match="cannot be read: ") as caught:
            read_state_dict(path)
        assert words in str(caught.value)
