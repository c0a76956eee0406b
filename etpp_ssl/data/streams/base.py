"""Data that is read in sequence instead of by index: what a stream offers, and the settings of every stream.

A *worker shard* is what one data worker of one process reads, so there are processes * max(1,
data.num_workers) of them. A stream cannot be addressed by index, and the order of a run's images depends on
the number of worker shards and on the size of the micro-batches, which they serve in turn. The promise is
therefore less than for indexed data: for a fixed number of processes and data workers the order is a function
of the seed, and a resumed run continues exactly where it was.

timm's own readers of streams (`wds/...`, `hfids/...`) cannot keep that promise: their shuffle buffers draw
from a generator whose state cannot be stored, and they know no place to resume from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import Field, model_validator

from etpp_ssl.config import UserError, may_change
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.splits import AnyIndexedData, open_split

Cursor = dict[str, Any]
"""Where a worker shard stands, in a form that survives JSON."""


class Item(NamedTuple):
    """What lies at one place of a stream: an image, or what should have been one."""

    name: str
    """`shard :: key`."""
    data: bytes = b""
    """The image file."""
    label: int | str = -1
    """Class index, -1 for none, or a class name."""
    fault: str = ""
    """Why there is no image, in a few words."""


class WorkerShard(Protocol):
    """One worker's endless sequence of items."""

    def take(self) -> Item:
        """The next item.

        Raises:
            RunFault: if a shard cannot be read.
        """

    def cursor(self) -> Cursor:
        """Where the next item lies; `Stream.worker_shard` resumes from there."""


class Stream(Protocol):
    """A data set that is read in sequence; small to pickle, safe to use from data workers."""

    classes: list[str] | None
    """Class names, in the order of the labels, where the data tells them."""
    has_labels: bool
    """Whether labels are read."""

    def fingerprint(self) -> str:
        """A short hash of what the data set consists of; a resumed run must find the same."""

    def describe(self) -> str:
        """What it consists of, in a few words for people."""

    def check_workers(self, num_workers: int) -> None:
        """Check that each of so many data workers, over all processes, has something to read in every epoch.

        Raises:
            UserError: if there are fewer shards than workers.
        """

    def sample(self, count: int) -> Iterator[Item]:
        """At most so many items of a few keyed shards, for a look at what the stream holds.

        Raises:
            RunFault: if a shard cannot be read.
        """

    def worker_shard(self, worker: int, num_workers: int, cursor: Cursor | None) -> WorkerShard:
        """What one data worker reads; item n is a function of (seed, worker, num_workers, n) and of the data.

        Args:
            worker: its number among those of all processes.
            num_workers: data workers of all processes; a process without any counts as one.
            cursor: of the same worker, where to resume; None is the beginning.
        """


class StreamConfig(DataConfig):
    """Settings that every stream shares."""

    num_images: int | None = Field(default=None, ge=1)
    """Images in an epoch, which the number of steps follows from. A stream does not tell it, so it has to be
    given; if it is not quite right, the run trains as many images as it says."""
    classes: tuple[str, ...] | None = None
    """Class names in the order of the labels, where the data does not tell them; labels that are names need
    them. With numbers a classifier can do without, given `model.num_classes`: its evaluation images' classes
    then have to be those of the labels, in their order, and lend it their names."""
    eval: Annotated[AnyIndexedData, Field(discriminator="name")] | None = may_change(None)
    """Data that is read by index, for evaluation: its "eval" part, and its "train" part for probes that
    need labelled training images. Its settings of loading and of views have no effect."""
    num_workers: int = may_change(4, ge=0)
    """Data worker processes per training process. The order of the images depends on it, so that a resumed
    run needs the same number (0 and 1 are the same)."""

    @model_validator(mode="after")
    def _for_streams(self) -> StreamConfig:
        if self.num_images is None:
            raise ValueError(
                "num_images is missing: the number of steps follows from the images of an epoch, which a "
                "stream does not tell"
            )
        if self.cache != "off":
            raise ValueError(f"cache is {self.cache}, but a stream's images are not all at hand at once")
        for key, default in (
            ("holdout", 0),
            ("holdout_share", 0),
            ("label_share", None),
            ("labels_per_class", None),
        ):
            value = getattr(self, key)
            if value != default:
                raise ValueError(
                    f"{key} is {value:g}, but a stream's images cannot be chosen by index; evaluation images "
                    f"come from data.eval"
                )
        return self

    @abstractmethod
    def open_stream(self, seed: int) -> Stream:
        """Open the training images.

        Raises:
            UserError: if they are not there, or the library that reads them is not installed.
        """

    def open(self, split: str, *, in_chans: int, image_size: tuple[int, int], seed: int) -> ImageSource:
        """Open the "train" or the "eval" part of `eval`; see `DataConfig.open`."""
        if self.eval is None:
            part = "evaluation images" if split == "eval" else "images by index"
            raise UserError(
                f"data.eval is missing: a stream has no {part}; data.eval={{name: folder, root: FOLDER}} "
                f"takes them from a folder"
            )
        # Values mean the same in both parts.
        alike = {
            key: getattr(self, key) for key in ("range", "clip", "nodata", "mean", "std", "channel_sampling")
        }
        config = self.eval.model_copy(update=alike)
        return open_split(config, split, in_chans=in_chans, image_size=image_size, seed=seed)


def label_of(stored: Any) -> int | str:
    """A label as data sets store it: a class index, the name of a class without space around it, or -1."""
    if isinstance(stored, bytes):
        stored = stored.decode("utf-8", "replace")
    if isinstance(stored, str):
        return stored.strip() or -1
    if isinstance(stored, float) and stored.is_integer():
        stored = int(stored)
    return max(-1, int(stored)) if isinstance(stored, int) else -1
