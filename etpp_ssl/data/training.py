"""What a run trains on, images that are addressed by index or a stream: the one place where they part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch.utils.data import Dataset

from etpp_ssl.config import UserError
from etpp_ssl.data.loader import Batch, BatchBuilder
from etpp_ssl.data.sampler import BatchRequest, BySampleId, KeyedOrder, RequestSampler
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.splits import check_labels, open_split
from etpp_ssl.data.streams.base import Stream, StreamConfig
from etpp_ssl.data.streams.loader import StreamBuilder, StreamPlace, StreamRequests
from etpp_ssl.data.views import View

Sampling = Callable[[KeyedOrder | BySampleId], RequestSampler]
"""From an order to one process's requests in that order."""


class Loading(NamedTuple):
    """What a loader needs."""

    builder: Dataset[Batch]
    requests: Iterable[BatchRequest]


@dataclass(frozen=True)
class Reader:
    """Who reads the images, and what for.

    Args:
        seed: the run's seed.
        rank, num_processes: which part of every step is the process's.
        view: the training view.
        num_classes: of a classifier; labels are checked against it.
        place: where the process stands in a stream.
    """

    seed: int
    rank: int
    num_processes: int
    view: View
    num_classes: int | None
    place: StreamPlace


class TrainingImages(Protocol):
    """What a run needs to know of the images that it trains on."""

    classes: list[str] | None
    """Class names, in the order of the labels, where they are known."""
    is_stream: bool
    """Whether the number of processes and data workers changes the order."""

    def __len__(self) -> int:
        """Images in an epoch."""

    def fingerprint(self) -> str:
        """A short hash of what the data set contains; a resumed run must find the same."""

    def name(self, index: int) -> str:
        """What a person would look for; `index` is one of a request's `indices`."""

    def check_labels(self, num_classes: int) -> None:
        """Check that the images have labels that a classifier can learn, as far as that shows unread.

        Raises:
            UserError: naming the first image whose label is wrong.
        """

    def check_workers(self, num_workers: int) -> None:
        """Check that so many data workers, over all processes, can share the images.

        Raises:
            UserError: if they cannot.
        """

    def loading(self, sampler: Sampling, reader: Reader) -> Loading:
        """One process's batches.

        Args:
            sampler: of the process.
            reader: the process.
        """


class IndexedImages:
    """Images that are addressed by index; see `TrainingImages`.

    Args:
        source: the images.
    """

    is_stream = False

    def __init__(self, source: ImageSource) -> None:
        self.source = source
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self.source.fingerprint()

    def name(self, index: int) -> str:
        """See `ImageSource.name`."""
        return self.source.name(index)

    def check_labels(self, num_classes: int) -> None:
        """See `etpp_ssl.data.sources.splits.check_labels`."""
        check_labels(self.source, num_classes)

    def check_workers(self, num_workers: int) -> None:
        """Any number can."""

    def loading(self, sampler: Sampling, reader: Reader) -> Loading:
        """See `TrainingImages.loading`."""
        order = KeyedOrder(len(self), reader.seed)
        return Loading(BatchBuilder(self.source, reader.view, order, reader.num_classes), sampler(order))


class StreamedImages:
    """Images that are read in sequence; see `TrainingImages`.

    Args:
        stream: the images.
        num_images: in an epoch, as the recipe states it.
        in_chans: channels to decode to.
        max_pixels: larger images count as unreadable.
        classes: class names where the stream does not tell them.
    """

    is_stream = True

    def __init__(
        self,
        stream: Stream,
        num_images: int,
        in_chans: int,
        max_pixels: int,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.stream = stream
        self.num_images = num_images
        self.in_chans = in_chans
        self.max_pixels = max_pixels
        self.classes = list(classes) if classes is not None else stream.classes

    def __len__(self) -> int:
        return self.num_images

    def fingerprint(self) -> str:
        """See `Stream.fingerprint`."""
        return self.stream.fingerprint()

    def name(self, index: int) -> str:
        """The number of the sample: its name is known to the data worker that reads it."""
        return f"sample {index} of the stream"

    def check_labels(self, num_classes: int) -> None:
        """Only whether there are some; `StreamBuilder` sees each of them."""
        if not self.stream.has_labels:
            raise UserError(
                "training on labels needs some, and the stream's are not read: give its label_key or "
                "label_column"
            )

    def check_workers(self, num_workers: int) -> None:
        """See `Stream.check_workers`."""
        self.stream.check_workers(num_workers)

    def loading(self, sampler: Sampling, reader: Reader) -> Loading:
        """See `TrainingImages.loading`."""
        builder = StreamBuilder(
            self.stream,
            reader.view,
            reader.place,
            rank=reader.rank,
            num_processes=reader.num_processes,
            in_chans=self.in_chans,
            max_pixels=self.max_pixels,
            num_classes=reader.num_classes,
        )
        return Loading(builder, StreamRequests(sampler(BySampleId()), reader.place))


def open_training(
    config: DataConfig, *, in_chans: int, image_size: tuple[int, int], seed: int
) -> TrainingImages:
    """Open the training images of a recipe's data.

    Raises:
        UserError: if they are not there.
    """
    if isinstance(config, StreamConfig):
        assert config.num_images is not None
        return StreamedImages(
            config.open_stream(seed), config.num_images, in_chans, config.max_pixels, config.classes
        )
    return IndexedImages(open_split(config, "train", in_chans=in_chans, image_size=image_size, seed=seed))
