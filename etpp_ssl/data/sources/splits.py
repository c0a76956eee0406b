"""Opens the training and the evaluation part of a data set, draws keyed subsets, and checks labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np

from etpp_ssl.config import UserError, listed
from etpp_ssl.data.formats.base import Picture, Reading
from etpp_ssl.data.sources.base import DataConfig, ImageSource, no_image_of
from etpp_ssl.data.sources.folder import FileListConfig, FolderConfig
from etpp_ssl.data.sources.names import CHUNK, small_labels
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.sources.timm_dataset import TimmConfig
from etpp_ssl.data.sources.windows import PartSource, TiledConfig
from etpp_ssl.randomness import keyed_permutation

AnyIndexedData = FolderConfig | FileListConfig | TimmConfig | SyntheticConfig | ShardsConfig
"""The data sources that are addressed by index: those known to recipes, and to streams for evaluation."""
TRAINING = ("train", "holdout")
"""Parts of the training images."""
NO_LABELS = "two class sub-folders or more, or class names in a list, would be labels"


class Subset:
    """Some images of a source, under new numbers.

    Args:
        source: where they come from.
        indices: their numbers there.
        hash_indices: whether the fingerprint depends on which images these are, not only on how many.
        classes: class names in another order, or more of them; None keeps the source's.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: Sequence[int] | np.ndarray,
        *,
        hash_indices: bool = False,
        classes: list[str] | None = None,
    ) -> None:
        self.source = source
        self.indices = indices if isinstance(indices, range) else _compact(indices)
        self.hash_indices = hash_indices
        self.classes = source.classes if classes is None else classes
        self._labels: dict[int, int] = {}
        if classes is not None and source.classes is not None:
            self._labels = {old: classes.index(name) for old, name in enumerate(source.classes)}

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> Picture:
        """See `ImageSource.open`."""
        return self.source.open(int(self.indices[index]))

    def label(self, index: int) -> int:
        """See `ImageSource.label`."""
        label = self.source.label(int(self.indices[index]))
        return self._labels.get(label, label)

    def all_labels(self) -> np.ndarray | None:
        """See `ImageSource.all_labels`."""
        labels = self.source.all_labels()
        if labels is None:
            return None
        taken = labels if isinstance(self.indices, range) else labels[self.indices]
        if not self._labels:
            return taken
        # The last entry is that of the label -1.
        renumbered = np.array([*(self._labels[old] for old in range(len(self._labels))), -1])
        known: np.ndarray = small_labels(renumbered)[taken]
        return known

    def name(self, index: int) -> str:
        """See `ImageSource.name`."""
        return self.source.name(int(self.indices[index]))

    def fingerprint(self) -> str:
        """That of the whole source, with the number of images taken, and where asked for a hash of which."""
        found = f"{self.source.fingerprint()}/{len(self)}"
        if self.hash_indices:
            found += f":{self._hashed(6)}"
        return found

    def stamp(self) -> str | None:
        """That of the whole source, with which images are taken; see `FileSource.stamp`."""
        whole: str | None = self.source.stamp() if hasattr(self.source, "stamp") else None
        return whole and f"{whole}:{self._hashed(12)}"

    def _hashed(self, digest_size: int) -> str:
        """Hash of the numbers in the source."""
        digest = hashlib.blake2b(digest_size=digest_size)
        for first in range(0, len(self), CHUNK):
            numbers = np.asarray(self.indices[first : first + CHUNK]).tolist()
            digest.update(b"," * (first > 0) + ",".join(map(str, numbers)).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """The source, how much of it, and which classes have no image there."""
        part = f"{len(self):,} of " if len(self) < len(self.source) else ""
        without = sorted(set(self.classes or ()).difference(self.source.classes or ()))
        return f"{part}{self.source.describe()}" + (f"; {no_image_of(without)}" if without else "")


def open_split(
    config: DataConfig,
    split: str,
    *,
    in_chans: int,
    image_size: tuple[int, int],
    seed: int,
    parts: bool = True,
) -> ImageSource:
    """Open the "train", the "holdout" or the "eval" part of a recipe's data.

    With `data.holdout`, a keyed draw of that many training images is the evaluation part, and
    training never sees them. Of the others, `data.label_share` or `data.labels_per_class` takes some of
    each class, and of these `data.holdout_share` keeps some from training: the part "holdout", for choosing
    settings. With `data.tile` or `data.frames` all of these are files, whose parts are then the images,
    unless the files are asked for by `parts=False`.

    Raises:
        UserError: if the data is not there or has no images, the holdout leaves nothing to train on, or
            a draw per class is asked for and the labels do not allow it.
    """
    source = _open_whole(config, split, in_chans=in_chans, image_size=image_size, seed=seed)
    share, per_class = config.label_share, config.labels_per_class
    if split in TRAINING and (share is not None or per_class is not None):
        indices = label_subset(source, share=share, per_class=per_class, seed=seed)
        source = Subset(source, indices, hash_indices=True)
    if split == "holdout" or (split == "train" and config.holdout_share):
        source = _held_out(source, config.holdout_share, split, seed)
    return config.parts(source) if parts and isinstance(config, TiledConfig) else source


def _open_whole(
    config: DataConfig, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int
) -> ImageSource:
    opened = "train" if config.holdout or split in TRAINING else split
    source = config.open(opened, in_chans=in_chans, image_size=image_size, seed=seed)
    if len(source) == 0:
        part = "training" if opened == "train" else "evaluation"
        raise UserError(f"data: the {part} split has no images")
    if not config.holdout:
        return source
    if config.holdout >= len(source):
        raise UserError(
            f"data.holdout {config.holdout} leaves nothing to train on: there are {len(source)} images"
        )
    held_out = keyed_indices(len(source), config.holdout, seed, "holdout")
    if split not in TRAINING:
        return Subset(source, held_out)
    is_taken = np.ones(len(source), bool)
    is_taken[held_out] = False
    return Subset(source, np.flatnonzero(is_taken))


def _held_out(source: ImageSource, share: float, split: str, seed: int) -> Subset:
    """The training images of `data.holdout_share`, or those that it keeps from training."""
    if not share:
        raise UserError(
            "the split holdout is a share of the training images: give data.holdout_share, such as 0.1"
        )
    members = class_members(source, "data.holdout_share")
    is_held_out = np.zeros(len(source), bool)
    for label, indices in members.items():
        count = min(max(1, round(share * len(indices))), len(indices) - 1)
        is_held_out[indices[keyed_indices(len(indices), count, seed, "holdout", label)]] = True
    if not is_held_out.any():
        raise UserError(
            f"data.holdout_share {share:g} of {len(source)} training images holds out none, as no class has "
            f"two; give data.holdout_share=0 and optim.base_lr as a number"
        )
    return Subset(source, np.flatnonzero(is_held_out == (split == "holdout")), hash_indices=True)


def label_subset(source: ImageSource, *, share: float | None, per_class: int | None, seed: int) -> np.ndarray:
    """A keyed draw of images from each class, a function of the seed and of the source's order.

    A class's images are ranked by a draw keyed by (seed, class) and the first of them taken, so the images
    of a smaller draw are among those of a larger one. See `read_labels`.

    Args:
        source: labelled images; their order is the same on every machine.
        share: of each class, in (0, 1], rounded to whole images (ties to even), at least one; or None.
        per_class: images of each class instead.
        seed: the run's seed.

    Returns:
        Numbers of the images, int64 (taken,), ascending.

    Raises:
        UserError: if there are no labels, or a class has fewer than `per_class` images.
    """
    members = class_members(source, "data.labels_per_class" if share is None else "data.label_share")
    taken = []
    for label, indices in members.items():
        if share is not None:
            count = max(1, round(share * len(indices)))
        else:
            assert per_class is not None
            count = per_class
        if count > len(indices):
            assert source.classes is not None
            raise UserError(
                f"data.labels_per_class is {count}, but class {source.classes[label]!r} has "
                f"{len(indices)} images"
            )
        taken.append(indices[keyed_indices(len(indices), count, seed, "labels", label)])
    return np.sort(np.concatenate(taken))


def class_members(source: ImageSource, key: str) -> dict[int, np.ndarray]:
    """The numbers of each class's images, int64, ascending; see `read_labels`."""
    labels = read_labels(source, key)
    order = labels.argsort(kind="stable")
    found, first = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, first[1:]), strict=True))


def read_labels(source: ImageSource, key: str) -> np.ndarray:
    """Each image's class index, (N,). Where labels are known only on reading, every image is read once.

    Args:
        source: labelled images.
        key: of the recipe, which needs them.

    Raises:
        UserError: if there are no labels, or an image has none.
    """
    if source.classes is None:
        raise UserError(f"{key} needs labels, and the data has none ({NO_LABELS})")
    labels = source.all_labels()
    if labels is None:
        labels = np.array([source.label(index) for index in range(len(source))])
    without = np.flatnonzero(np.asarray(labels) < 0)
    if len(without):
        raise UserError(f"{key} needs labels, and image {source.name(int(without[0]))!r} has none")
    return labels


def read_anew(source: ImageSource, reading: Reading) -> ImageSource:
    """The same images, whose files become pictures in another way; nothing is looked for again."""
    other: Any = copy(source)
    if isinstance(source, Subset | PartSource):
        other.source = read_anew(source.source, reading)
    else:
        object.__setattr__(other, "reading", reading)  # One is frozen.
    return other  # type: ignore[no-any-return]


def with_classes(source: ImageSource, classes: list[str]) -> ImageSource:
    """Evaluation images with the class indices of training. Some classes may have no image.

    Args:
        source: labelled images.
        classes: of training, in the order of a classifier's outputs.

    Raises:
        UserError: if there are no labels, or some of classes that training lacks, of which it names five.
    """
    if source.classes is None:
        raise UserError(f"the evaluation images have no labels, and the training images have ({NO_LABELS})")
    unknown = sorted(set(source.classes).difference(classes))
    if unknown:
        raise UserError(
            f"the evaluation images have classes that training lacks: {listed(unknown)}; training has "
            f"{listed(classes)}"
        )
    return source if source.classes == classes else Subset(source, range(len(source)), classes=classes)


def check_labels(source: ImageSource, num_classes: int) -> None:
    """Check that every image has a label that a classifier of `num_classes` can learn.

    Labels that are known only on reading are left to `check_label`, which `BatchBuilder` calls.

    Raises:
        UserError: naming the first image whose label is wrong.
    """
    if source.classes is None:
        raise UserError(f"training on labels needs some, and the data has none ({NO_LABELS})")
    labels = source.all_labels()
    if labels is not None:
        wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(wrong):
            index = int(wrong[0])
            check_label(source.name(index), int(labels[index]), num_classes)


def check_label(name: str, label: int, num_classes: int) -> None:
    """Check the label of the image called `name`; see `check_labels`."""
    if not 0 <= label < num_classes:
        what = f"has label {label}" if label >= 0 else "has no label"
        valid = f"model.num_classes is {num_classes}: labels are 0 to {num_classes - 1}"
        raise UserError(f"image {name!r} {what}, but {valid}")


def keyed_indices(num_images: int, count: int, seed: int, purpose: str, *position: int) -> list[int]:
    """A keyed uniform draw of `count` out of `num_images` numbers without repeats, ascending."""
    return sorted(keyed_permutation(num_images, seed, purpose, *position)[:count].tolist())


def _compact(indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers from 0 on, in half the memory where they allow it."""
    numbers = np.asarray(indices, np.int64)
    return numbers.astype(np.int32) if numbers.max(initial=0) < 1 << 31 else numbers
