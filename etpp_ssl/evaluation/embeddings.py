r"""Features of a data set as one safetensors file.

    features    float32 (n, D)
    labels      int64 (n,), -1 without labels
    indices     int64 (n,), the images' numbers in their split
    names       uint8, the images' names in UTF-8 with a zero byte between two

The names are a tensor because the metadata of the format ends at 100 MB, which the names of a large data
set exceed. Without this package, this reads them:

    tensors = safetensors.numpy.load_file("train.safetensors")
    names = tensors["names"].tobytes().decode(errors="surrogateescape").split("\0")

The metadata says how the features were made; its `classes` is a JSON list, or null without labels.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.evaluation.features import Features
from etpp_ssl.files import replaced_file

TENSORS = ("features", "labels", "indices", "names")


@dataclass(frozen=True)
class Embeddings:
    """Features of n images, on the CPU, and what the images are."""

    rows: Features
    names: list[str]
    """n of them, as the data source gives them: relative paths, for instance."""
    classes: list[str] | None
    """Class names, in the order of the labels."""
    notes: dict[str, str]
    """How the features were made."""


def make_room(file: Path) -> None:
    """Create the folder of a file that is about to be written.

    Raises:
        UserError: if that fails, or the file is a folder.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be written: {error.strerror or error}") from error
    if os.path.isdir(file):
        raise UserError(f"{str(file)!r} is a folder; give the name of a file in it")


def write_embeddings(file: Path, embeddings: Embeddings) -> None:
    """Write a file, whole or not at all; its folder is there, see `make_room`.

    Raises:
        UserError: if it cannot be written.
    """
    text = "\0".join(name.replace("\0", "\N{REPLACEMENT CHARACTER}") for name in embeddings.names)
    # Linux allows any bytes in a file's name; Python shows those that are not UTF-8 as lone surrogates.
    names = np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8).copy()
    tensors = {
        **{key: rows.contiguous() for key, rows in embeddings.rows._asdict().items()},
        "names": torch.from_numpy(names),
    }
    metadata = {"format": "pt", **embeddings.notes, "classes": json.dumps(embeddings.classes)}
    with replaced_file(file) as aside:
        save_file(tensors, aside, metadata=metadata)


def read_embeddings(file: str | Path) -> Embeddings:
    """Read what `write_embeddings` wrote.

    Raises:
        UserError: if the file is not there or holds something else.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            missing = sorted(set(TENSORS) - set(opened.keys()))
            if missing:
                raise UserError(f"{str(file)!r} holds no embeddings: it lacks {', '.join(missing)}")
            tensors: dict[str, Tensor] = {key: opened.get_tensor(key) for key in TENSORS}
            notes = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(file)!r} cannot be read: {error}") from error
    text = tensors.pop("names").numpy().tobytes().decode(errors="surrogateescape")
    classes = json.loads(notes.pop("classes", "null"))
    notes.pop("format", None)
    return Embeddings(Features(**tensors), text.split("\0"), classes, notes)
