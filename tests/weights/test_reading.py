"""A file that others wrote gives plain tensors or one sentence, whatever is in it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.weights.reading import load_weights, read_state_dict, without_prefix

TENSORS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}


def write_zip(file: Path) -> None:
    torch.save({"model": TENSORS}, file)


def write_old(file: Path) -> None:
    torch.save({"model": TENSORS}, file, _use_new_zipfile_serialization=False)


def write_safetensors(file: Path) -> None:
    save_file(TENSORS, file)


@pytest.mark.parametrize("write", [write_zip, write_old, write_safetensors], ids=lambda w: w.__name__)
def test_any_damage_is_one_sentence(write: Callable[[Path], None], tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    write(whole)
    content = whole.read_bytes()
    draw = random.Random(3)
    refused: list[str] = []
    for _ in range(150):
        changed = bytearray(content)
        # The first bytes hold the names and what the pickle does; most of the rest is values.
        place = draw.randrange(min(len(changed), draw.choice([100, 600, len(changed)])))
        if draw.random() < 0.7:
            changed[place] = draw.randrange(256)
        else:
            del changed[place]
        damaged.write_bytes(bytes(changed))
        try:
            read_state_dict(damaged)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in sentence for sentence in refused)


STRANGE: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "without values": lambda: torch.empty(3, device="meta"),
    "a few bytes for a terabyte": lambda: torch.zeros(1).expand(10**12),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_array_is_refused(make: Callable[[], Tensor], tmp_path: Path) -> None:
    torch.save({"good": torch.ones(2), "bad": make()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"not plain arrays in memory \(.*\): bad$"):
        read_state_dict(tmp_path / "x.pth")


def test_parameters_views_and_half_precision_are_plain(tmp_path: Path) -> None:
    tensors = {
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "view": torch.arange(16.0).reshape(4, 4)[1:3].T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "counter": torch.tensor(3),
    }
    torch.save(tensors, tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


def test_whole_numbers_are_no_weights() -> None:
    with pytest.raises(UserError, match=r"it is of another model: w is int64$"):
        load_weights({"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.int64)}, "it")
    assert load_weights({"w": torch.ones(2)}, {"w": torch.ones(2).half()}, "it").keys() == {"w"}


def test_a_prefix_goes_only_where_all_names_have_it() -> None:
    one = torch.ones(1)
    assert without_prefix({"net.a": one, "net.net.b": one}, "net.").keys() == {"a", "net.b"}
    assert without_prefix({"net.a": one, "b": one}, "net.").keys() == {"net.a", "b"}
