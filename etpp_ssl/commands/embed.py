"""A data set's features, written to a file.

Features of a data set as one safetensors file.

    features    float32 (n, D)
    labels      int64 (n,), -1 without labels
    indices     int64 (n,), the images' numbers in their split
    names       uint8, the images' names in UTF-8 with a zero byte between two

The names are a tensor because the metadata of the format ends at 100 MB, which the names of a large data
set exceed. Without this package they are read by

    tensors = safetensors.numpy.load_file("train.safetensors")
    names = tensors["names"].tobytes().decode(errors="surrogateescape").split("\0")

The metadata says how the features were made; its `classes` is a JSON list, or null without labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.features import Features, Pool, extract_features, run_precision
from etpp_ssl.files import replaced_file
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.weights.loading import load_init, load_trained


@with_peers()
def embed(
    recipe: Recipe,
    folder: RunFolder | None,
    out: Path | None,
    *,
    split: str,
    pool: Pool | None,
    batch_size: int,
    say: Callable[[str], None],
) -> Path:
    """Extract features of all images of a split and write them; see `evaluation.embeddings`.

    Unreadable images are left out. The forward pass is in bf16 if that is the recipe's precision.

    Args:
        recipe: the data and the model.
        folder: the run whose newest checkpoint is taken; None takes the weights of `recipe.init`.
        out: the file; None is `RUN/embeddings/<split>.safetensors`.
        split: "train" or "eval".
        pool: cls token or mean of the patch tokens; None is the encoder's own.
        batch_size: images that are loaded together.
        say: told of damaged checkpoints and of images that are left out.

    Returns:
        The file, which the main process has written.

    Raises:
        UserError: if there are no weights or no images, or the file cannot be written.
    """
    if out is None:
        if folder is None:
            raise UserError("a recipe is no place for features: give a file to write, --out FILE.safetensors")
        folder.recipe()
        out = folder.path / "embeddings" / f"{split}.safetensors"
    # Before the work, not after it.
    make_room(out)
    accelerator = open_accelerator(recipe)
    source = open_split(
        recipe.data, split, in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed
    )
    model, weights = _trained(recipe, folder, say)
    model.to(accelerator.device)
    features = extract_features(
        model.encoder,
        source,
        list(range(len(source))),
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=Normalise(*recipe.data.statistics(recipe.in_chans), accelerator.device),
        accelerator=accelerator,
        pool=pool,
        batch_size=batch_size,
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
    )
    unreadable = len(source) - len(features.indices)
    if unreadable == len(source):
        raise UserError(f"none of the {unreadable} images of the {split} split can be read")
    if accelerator.is_main_process:
        if unreadable:
            say(f"left out: {unreadable} of {len(source)} images cannot be read")
        embeddings = Embeddings(
            rows=Features(*(rows.cpu() for rows in features)),
            names=[source.name(index) for index in features.indices.tolist()],
            classes=source.classes,
            notes={
                "split": split,
                "weights": weights,
                "pool": pool or model.encoder.global_pool,
                "precision": run_precision(accelerator),
                "image_size": show_size(recipe.size),
                "crop_pct": f"{recipe.data.crop_pct:g}",
                "num_unreadable": str(unreadable),
            },
        )
        write_embeddings(out, embeddings)
    leave(accelerator)
    return out


def _trained(
    recipe: Recipe, folder: RunFolder | None, say: Callable[[str], None]
) -> tuple[MaskedAutoencoder, str]:
    """The model with its weights, and where they are from."""
    model = freshly_initialised(recipe.seed, recipe.build_model)
    if folder is not None:
        checkpoint = folder.trained(say)
        load_trained(model, checkpoint)
        return model, str(checkpoint.path)
    if recipe.init is None:
        raise UserError("there are no weights to embed with: give a run, or init=WEIGHTS with the recipe")
    load_init(model, recipe.init, say)
    return model, recipe.init


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
