"""The images that a run trains on: addressed by index, or a stream. Above this file nobody asks which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import numpy as np

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import BatchBuilder, Builder
from etpp_ssl.data.sampler import BalancedOrder, BatchRequest, KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.names import label_counts
from etpp_ssl.data.sources.splits import check_label, check_labels, open_split, read_labels
from etpp_ssl.data.streams.base import StreamConfig
from etpp_ssl.data.streams.loader import StreamBuilder, StreamPlace, StreamRequests
from etpp_ssl.data.uneven import Balance
from etpp_ssl.data.views import View


class IndexedImages:
    """Images that are addressed by index.

    Args:
        source: the images.
        seed: the run's seed, which their order is keyed by.
        balance: how often classes are drawn.
    """

    is_stream = False
    """Whether the number of processes and data workers changes the order."""

    def __init__(self, source: ImageSource, seed: int, balance: Balance = "none") -> None:
        self.source = source
        self.seed = seed
        self.balance = balance
        self.classes = source.classes
        """Class names, in the order of the labels, where they are known."""
        self.opened: ImageSource = source
        """Opens what is trained on: the source, or `etpp_ssl.data.cache.KeptImages` of it."""

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """A short hash of what the data set contains; a resumed run must find the same."""
        return self.source.fingerprint()

    def describe(self) -> str:
        """What was found and what was left out, in one line for people."""
        return self.source.describe()

    def name(self, index: int) -> str:
        """What a person would look for; `index` is one of a request's `indices`."""
        return self.source.name(index)

    def class_counts(self, num_classes: int, *, read: bool) -> list[int] | None:
        """Images of each class.

        Args:
            num_classes: of the model; the data may have fewer.
            read: whether to read images for it; without, None comes of labels that are known only on reading.

        Raises:
            UserError: if an image has no label, or one that is none of the classes.
        """
        if not read and self.source.all_labels() is None:
            return None
        wrong = np.flatnonzero(self.labels >= num_classes)
        if len(wrong):
            index = int(wrong[0])
            check_label(self.source.name(index), int(self.labels[index]), num_classes)
        counts: list[int] = label_counts(self.labels, num_classes).tolist()
        return counts

    @cached_property
    def labels(self) -> np.ndarray:
        """Each image's class; see `etpp_ssl.data.sources.splits.read_labels`."""
        return read_labels(self.source, "augment.balance, class_weights or logit_adjustment")

    def check_labels(self, num_classes: int) -> None:
        """See `etpp_ssl.data.sources.splits.check_labels`."""
        check_labels(self.source, num_classes)

    def check_workers(self, num_workers: int) -> None:
        """Any number of data workers can share the images."""

    def loading(
        self, sampler: RequestSampler, view: View, num_classes: int | None, place: StreamPlace
    ) -> tuple[Builder, Iterable[BatchRequest]]:
        """One process's batches, for `load_batches`.

        Args:
            sampler: of the process, without an order.
            view: the training view.
            num_classes: of a classifier; labels are checked against it.
            place: where the process stands in a stream.
        """
        if self.balance == "none":
            order = KeyedOrder(len(self), self.seed)
        else:
            order = BalancedOrder(self.labels, self.seed, self.balance)
        return BatchBuilder(self.opened, view, order, num_classes), replace(sampler, order=order)


class StreamedImages:
    """Images that are read in sequence; offers what `IndexedImages` does.

    Args:
        config: tells their number, and their classes where the stream does not.
        in_chans: channels to decode to.
        seed: the run's seed.
    """

    is_stream = True

    def __init__(self, config: StreamConfig, in_chans: int, seed: int) -> None:
        self.config = config
        self.in_chans = in_chans
        self.stream = config.open_stream(seed)
        self.classes = list(config.classes) if config.classes is not None else self.stream.classes

    def __len__(self) -> int:
        assert self.config.num_images is not None
        return self.config.num_images

    def fingerprint(self) -> str:
        """See `Stream.fingerprint`."""
        return self.stream.fingerprint()

    def describe(self) -> str:
        """See `IndexedImages.describe`."""
        return f"{len(self):,} images an epoch, by data.num_images, of {self.stream.describe()}"

    def name(self, index: int) -> str:
        """The number of the sample; only the data worker that reads an image knows its name."""
        return f"sample {index} of the stream"

    def class_counts(self, num_classes: int, *, read: bool) -> None:
        """Nobody knows before the stream has been read."""

    def check_labels(self, num_classes: int) -> None:
        """Check that labels are read; `StreamBuilder` checks each of them.

        Raises:
            UserError: if they are not.
        """
        if not self.stream.has_labels:
            raise UserError(
                "training on labels needs some, and the stream's are not read: give its label_key or "
                "label_column"
            )

    def check_workers(self, num_workers: int) -> None:
        """See `Stream.check_workers`."""
        self.stream.check_workers(num_workers)

    def loading(
        self, sampler: RequestSampler, view: View, num_classes: int | None, place: StreamPlace
    ) -> tuple[Builder, Iterable[BatchRequest]]:
        """See `IndexedImages.loading`."""
        builder = StreamBuilder(
            self.stream,
            view,
            place,
            rank=sampler.rank,
            num_processes=sampler.num_processes,
            reading=self.config.reading(self.in_chans),
            num_classes=num_classes,
            classes=self.classes,
        )
        return builder, StreamRequests(sampler, place)


TrainingImages = IndexedImages | StreamedImages


def balanced(images: TrainingImages, balance: Balance) -> TrainingImages:
    """The same images, with classes drawn in other shares.

    Raises:
        UserError: if they are a stream, which cannot be drawn from.
    """
    if balance == "none":
        return images
    if isinstance(images, StreamedImages):
        raise UserError(
            f"augment.balance is {balance}, which draws images by their class, but the images of a stream "
            f"come as they come: use augment.balance=none, and augment.class_weights or "
            f"augment.logit_adjustment with augment.class_counts, or indexed data"
        )
    return IndexedImages(images.source, images.seed, balance)


def open_training(
    config: DataConfig, *, in_chans: int, image_size: tuple[int, int], seed: int
) -> TrainingImages:
    """Open the training images of a recipe's data.

    Raises:
        UserError: if they are not there.
    """
    if isinstance(config, StreamConfig):
        return StreamedImages(config, in_chans, seed)
    source = open_split(config, "train", in_chans=in_chans, image_size=image_size, seed=seed)
    return IndexedImages(source, seed)
