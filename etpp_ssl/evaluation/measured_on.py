"""What a result was measured on: which images, and whether the weights were trained on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.folder import FileSource, SplitFoldersConfig
from etpp_ssl.data.sources.splits import TRAINING, Subset
from etpp_ssl.data.sources.windows import PartSource
from etpp_ssl.data.streams.base import StreamConfig


class HasImages(Protocol):
    """A recipe, as far as its images go."""

    @property
    def data(self) -> DataConfig:
        """Where they come from."""

    def open_split(self, split: str) -> ImageSource:
        """The "train" or the "eval" images."""


Training = tuple[HasImages, str | None]
"""A recipe that weights were trained by, and its training images' fingerprint at that time, where known."""


def measured_on(
    recipe: HasImages, split: str, source: ImageSource, trainings: Sequence[Training]
) -> dict[str, Any]:
    """A record of the images that a result is of, for JSON.

    Args:
        recipe: whose images they are.
        split: "train", "holdout" or "eval"; every other name stands for "eval".
        source: the images, those of the split or a draw of them.
        trainings: of the weights, and of a probe's head.

    Returns:
        `data` (the kind of source), `root`, `split`, `holdout`, `num_images`, `fingerprint`, and
        `trained_on`, how many of the images the weights were trained on: None where that cannot be known.
    """
    split = split if split in TRAINING else "eval"
    data = _indexed(recipe.data)
    counts = [_num_trained_on(recipe, split, source, *training) for training in trainings]
    known = max((count for count in counts if count is not None), default=0)
    return {
        "data": data.name,
        "root": _root(data, split, source),
        "split": split,
        "holdout": data.holdout,
        "num_images": len(source),
        "fingerprint": source.fingerprint(),
        "trained_on": known or (None if None in counts else 0),
    }


def shown_number(name: str, value: float, digits: int = 4) -> str:
    """A result as people read it: accuracies and recalls are in per cent."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}g}" + (" %" if name.endswith(("top1", "top5", "recall")) else "")


def without_looking(source: ImageSource) -> str:
    """What a classifier gets right without looking at the images; empty where labels are not known.

    Args:
        source: the evaluation images, under the classes of training.
    """
    labels = source.all_labels() if source.classes else None
    if labels is None or not source.classes:
        return ""
    label, count = Counter(labels.tolist()).most_common(1)[0]
    return (
        f"without looking: {shown_number('top1', 100 / len(source.classes))} by chance, "
        f"{shown_number('top1', 100 * count / len(labels))} by class {source.classes[label]} alone"
    )


def training_mark(record: dict[str, Any] | None) -> str:
    """What has to stand beside a number of such a record: empty unless training images are among them."""
    count = (record or {}).get("trained_on")
    if not record or not count:
        return ""
    if count >= record["num_images"]:
        return "training images"
    return f"{count:,} of {record['num_images']:,} are training images"


def in_words(record: dict[str, Any], *, whole_path: bool = True) -> str:
    """A record as a phrase: `500 images of val, split eval, holdout 0, fingerprint 0123abcd`.

    Args:
        record: from `measured_on`.
        whole_path: whether the folder's whole path is told, or its name alone, as strangers are.
    """
    root = str(record["root"])
    place = root if whole_path else Path(root).name
    words = f"{record['num_images']:,} images of {place}, split {record['split']}"
    if record["holdout"]:
        words += f", holdout {record['holdout']:,}"
    mark = training_mark(record)
    return f"{words}, fingerprint {record['fingerprint']}" + (f" ({mark})" if mark else "")


def _indexed(data: Any) -> Any:
    """The data that is read by index: a stream's own is beside it."""
    return data.eval if isinstance(data, StreamConfig) and data.eval is not None else data


def _root(data: Any, split: str, source: ImageSource) -> str:
    whole = _whole(source)
    if isinstance(whole, FileSource):
        return str(whole.folder.absolute())
    # timm's title of a data set says its name and its split.
    return str(getattr(whole, "title", None) or getattr(data, "root", None) or f"{data.name} {split}")


def _whole(source: ImageSource) -> ImageSource:
    while isinstance(source, Subset | PartSource):
        source = source.source
    return source


def _num_trained_on(
    recipe: HasImages, split: str, source: ImageSource, trained: HasImages, fingerprint: str | None
) -> int | None:
    if isinstance(trained.data, StreamConfig):
        return None
    if _other_folder(recipe, split, trained):
        return 0
    try:
        training = trained.open_split("train")
    except UserError:
        # Perhaps they lie elsewhere now.
        return len(source) if split == "train" else None
    chosen = [trained.data.holdout, trained.data.holdout_share, trained.data.label_share]
    chosen += [trained.data.labels_per_class]
    if any(chosen) and fingerprint not in (None, training.fingerprint()):
        # The data has changed since, and another draw of it than now was trained on.
        return len(source) if split == "train" else None
    if _place(training) != _place(source):
        return 0
    wanted = Counter(_file_names(source))
    # One by one: there may be far more images of training than fit in memory by name.
    found = {name for name in _file_names(training) if name in wanted}
    return sum(wanted[name] for name in found)


def _other_folder(recipe: HasImages, split: str, trained: HasImages) -> bool:
    """Whether the images lie in another folder than those of training, as far as the recipes tell."""
    here, there = _indexed(recipe.data), trained.data
    if not (isinstance(here, SplitFoldersConfig) and isinstance(there, SplitFoldersConfig)):
        return False
    try:
        folder = here.folder("train" if here.holdout or split in TRAINING else split)
        return folder.resolve() != there.folder("train").resolve()
    except UserError:
        return False


def _place(source: ImageSource) -> str:
    """Where the images lie, which makes an image itself together with its name there."""
    whole = _whole(source)
    return str(whole.folder.resolve()) if isinstance(whole, FileSource) else whole.fingerprint()


def _file_names(source: ImageSource) -> Iterator[str]:
    """The name of each image in its place; of windows, which overlap, their file's."""
    return (_file_name(source, index) for index in range(len(source)))


def _file_name(source: ImageSource, index: int) -> str:
    if isinstance(source, Subset):
        return _file_name(source.source, int(source.indices[index]))
    if isinstance(source, PartSource):
        return source.source.name(source.part(index).file)
    return source.name(index)
