"""Some items of a stream, addressed by index: for a look at what it holds.

They are kept in memory, encoded, as a stream cannot be asked for one of them again.
"""

from __future__ import annotations

import numpy as np

from etpp_ssl.config import RunFault
from etpp_ssl.data.formats import open_picture
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage
from etpp_ssl.data.sources.base import images_of
from etpp_ssl.data.streams.base import Item, Stream

MOST_BYTES = 1 << 30
"""Of all items; a sample ends with the one that exceeds them."""


class StreamSample:
    """The first images of a few keyed shards; see `etpp_ssl.data.sources.base.ImageSource`.

    Args:
        stream: where they come from.
        count: how many, at most.
        reading: how they become pictures.
    """

    classes: list[str] | None = None

    def __init__(self, stream: Stream, count: int, reading: Reading) -> None:
        self.reading = reading
        self.fault = ""
        """Why it ended early, if a shard could not be read."""
        self._stream = stream
        self._items: list[Item] = []
        left = MOST_BYTES
        try:
            for item in stream.sample(count):
                self._items.append(item)
                left -= len(item.data)
                if left < 0:
                    break
        except RunFault as error:
            self.fault = str(error)

    def __len__(self) -> int:
        return len(self._items)

    def open(self, index: int) -> Picture:
        """See `ImageSource.open`."""
        item = self._items[index]
        if item.fault:
            raise UnreadableImage(item.fault)
        return open_picture(item.data, self.reading)

    def label(self, index: int) -> int:
        """None of them has one."""
        return -1

    def all_labels(self) -> np.ndarray:
        """None of them has one."""
        return np.full(len(self), -1)

    def name(self, index: int) -> str:
        """The shard's and the item's."""
        return self._items[index].name

    def fingerprint(self) -> str:
        """That of the whole stream."""
        return self._stream.fingerprint()

    def describe(self) -> str:
        """Their number, and the stream."""
        return f"{images_of(len(self))} at the beginning of {self._stream.describe()}"
