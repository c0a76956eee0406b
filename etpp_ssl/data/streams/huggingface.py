"""Hugging Face data sets as a stream: parquet, arrow and the like, local or remote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Literal

from etpp_ssl.config import NotAtHand, UserError, listed, may_change
from etpp_ssl.data.formats.base import require_library
from etpp_ssl.data.sources.base import printable
from etpp_ssl.data.streams.base import Item, StreamConfig, label_of
from etpp_ssl.data.streams.worker_shards import ShardSettings

ROWS_AT_ONCE = 16
"""Rows that the library turns into Python objects together."""


class HuggingFaceSettings(ShardSettings):
    """Which data set, and what in it is an image."""

    path: str
    """Of `datasets.load_dataset`: a data set of the hub, a folder, or a format (`parquet`, `arrow`, ...) that
    `data_files` are of. It is never downloaded as a whole."""
    config_name: str | None = None
    """The data set's configuration, where it has several."""
    data_files: str | tuple[str, ...] | None = may_change(None)
    """Files, patterns or URLs for a format."""
    split: str = "train"
    """Which split of the data set."""
    image_column: str = "image"
    """Column of images, or of encoded files as bytes."""
    label_column: str | None = "label"
    """Column of class indices, or of class names that `classes` lists; null reads none."""

    def open_reader(self) -> HuggingFaceReader:
        """Find the files; see `ShardSettings.open_reader`."""
        require_library("data.name huggingface", "datasets", "stream")
        import datasets

        title = f"data.path {self.path!r} (split {self.split!r})"
        files = self.data_files if isinstance(self.data_files, str | None) else list(self.data_files)
        try:
            builder = datasets.load_dataset_builder(self.path, name=self.config_name, data_files=files)
            data = builder.as_streaming_dataset(split=self.split)
            columns = data.features or next(iter(data))
        except Exception as error:
            # The library raises anything for a wrong name, file or split.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NotAtHand(f"{title} cannot be opened by datasets: {reason}") from error
        for key, column in (("image_column", self.image_column), ("label_column", self.label_column)):
            if column is not None and column not in columns:
                hint = "; null reads no labels" if key == "label_column" else ""
                raise UserError(
                    f"data.{key} {column!r} is not a column of {title}, which has "
                    f"{listed(list(columns))}{hint}"
                )
        # The files, where the library tells them and reads one after the other; otherwise numbers.
        names = [str(file) for file in (builder.config.data_files or {}).get(self.split, [])]
        if len(names) != data.num_shards:
            names = [f"{self.path}/{self.split}/{number}" for number in range(data.num_shards)]
        return HuggingFaceReader(data, self.image_column, self.label_column, names)


class HuggingFaceConfig(HuggingFaceSettings, StreamConfig):
    """A Hugging Face data set, read in sequence; `data.name: timm` reads downloaded ones by index."""

    name: Literal["huggingface"] = "huggingface"


class HuggingFaceReader:
    """Reads a data set file by file; see `etpp_ssl.data.streams.worker_shards.ShardReader`.

    Args:
        data: a `datasets.IterableDataset` with known columns.
        image_column, label_column: see `HuggingFaceSettings`.
        names: of the files.
    """

    def __init__(self, data: Any, image_column: str, label_column: str | None, names: list[str]) -> None:
        from datasets import Image

        self.image_column = image_column
        self.label_column = label_column
        self.names: Sequence[str] = names
        self.has_labels = label_column is not None
        features = data.features or {}
        self.classes: list[str] | None = getattr(features.get(label_column), "names", None)
        # Encoded, as they are stored. Columns of bytes are so already.
        is_image = isinstance(features.get(image_column), Image)
        data = data.cast_column(image_column, Image(decode=False)) if is_image else data
        self.data = data.select_columns([image_column, *([label_column] if label_column else [])])

    def read(self, shard: int, offset: int) -> Iterator[Item]:
        """The items of a file from row `offset` on.

        Raises:
            Exception: whatever `datasets` and the file systems behind it raise.
        """
        rows = self.data.shard(len(self.names), shard).skip(offset)
        number = count(offset)
        # Iterating over rows, the library would share them out among torch's data workers.
        for batch in rows.iter(ROWS_AT_ONCE):
            labels = batch[self.label_column] if self.label_column else None
            for place, image in enumerate(batch[self.image_column]):
                label = labels[place] if labels is not None else None
                yield self._item(f"{printable(self.names[shard])} :: row {next(number)}", image, label)

    def _item(self, name: str, image: Any, label: Any) -> Item:
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        if data is None and path is not None:
            from datasets.download.streaming_download_manager import xopen

            with suppress(FileNotFoundError), xopen(path, "rb") as file:
                data = file.read()
        if not isinstance(data, bytes):
            return Item(name, fault=f"its column {self.image_column} holds no image file")
        return Item(name, data, label_of(label))
