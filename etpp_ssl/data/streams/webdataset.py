"""WebDataset tars as a stream: local files, and whatever URL the webdataset library opens."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import field_validator

from etpp_ssl.config import NotAtHand, UserError, may_change
from etpp_ssl.data.formats.base import require_library
from etpp_ssl.data.sources.base import expanded, printable
from etpp_ssl.data.streams.base import Item, StreamConfig, label_of
from etpp_ssl.data.streams.worker_shards import ShardSettings

TARS = (".tar", ".tar.gz", ".tgz")
"""Names that count as shards inside a folder."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.IGNORECASE)
_META = re.compile(r"__[^/]*__($|/)")
"""What the webdataset library keeps for notes about the tar."""


class WebDatasetSettings(ShardSettings):
    """Which tars, and what in them is an image."""

    urls: str | tuple[str, ...] = may_change(...)
    """A folder, a pattern of local files (`*`, `?`), a pattern with braces (`{0000..0127}`), or a list of
    these. URLs are opened by webdataset: `http:`, `https:` (by curl), `gs:` (by gsutil), `hf:`, and
    `pipe:COMMAND` for everything else, for instance `pipe:aws s3 cp s3://bucket/0000.tar -`. COMMAND runs
    in a shell."""
    image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    """Extensions of the images, in lower case; the first that a sample has is taken."""
    label_key: str | None = "cls"
    """Extension of a text file with the class index, or a class name that `classes` lists; null reads none.
    Samples without one have no label. `json` is a number, a name, or an object with one in `label_field`."""
    label_field: str = "label"
    """Where a JSON object holds the label."""

    @field_validator("urls", "image_keys")
    @classmethod
    def _not_empty(cls, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not given:
            raise ValueError("it is empty: give at least one")
        return given

    def open_reader(self) -> WebDatasetReader:
        """Find the tars; see `ShardSettings.open_reader`."""
        require_library("data.name webdataset", "webdataset", "stream")
        urls = [self.urls] if isinstance(self.urls, str) else self.urls
        return WebDatasetReader(self, [url for pattern in urls for url in find_tars(pattern)])


class WebDatasetConfig(WebDatasetSettings, StreamConfig):
    """WebDataset tars, read in sequence; `data.name: shards` reads local uncompressed ones by index."""

    name: Literal["webdataset"] = "webdataset"


@dataclass(frozen=True)
class WebDatasetReader:
    """Reads tars; see `etpp_ssl.data.streams.worker_shards.ShardReader`.

    Files of a tar whose names are equal up to the first dot of their last part make one sample.
    """

    settings: WebDatasetSettings
    names: Sequence[str]
    """Local paths or URLs."""
    classes: list[str] | None = None

    @property
    def has_labels(self) -> bool:
        """See `Stream.has_labels`."""
        return self.settings.label_key is not None

    def read(self, shard: int, offset: int) -> Iterator[Item]:
        """The items of a tar, which is read from its start: a pipe cannot be asked for its middle.

        Where it is damaged or ends early, the sample there is an item that says so, and the last one.

        Raises:
            OSError: if it cannot be opened, or the connection or the command behind it fails.
            tarfile.ReadError: if it is not a tar.
        """
        return islice(self._read(self.names[shard]), offset, None)

    def _read(self, url: str) -> Iterator[Item]:
        from webdataset.gopen import gopen

        # The library takes the drive of a Windows path for a scheme.
        stream = gopen(url) if _SCHEME.match(url) else Path(url).open("rb")  # noqa: SIM115
        try:
            for key, files in groupby(_files(stream), itemgetter(0)):
                content = {extension: data for _, extension, data in files}
                yield self._item(f"{printable(url)} :: {printable(key)}", content)
        except OSError as error:
            # The library's sentence is its whole command line.
            code = re.search(r"exit (-?\d+) \(read\)", str(error))
            if code is None:
                raise
            raise OSError(f"exit code {code[1]} of what reads it") from error
        finally:
            # A command that is not read to its end may complain.
            with suppress(OSError):
                stream.close()

    def _item(self, name: str, files: dict[str, bytes]) -> Item:
        if _DAMAGE in files:
            return Item(name, fault=files[_DAMAGE].decode())
        keys = self.settings.image_keys
        found = next((key for key in keys if key in files), None)
        if found is None:
            return Item(name, fault=f"it has no file of {', '.join(keys)}")
        return Item(name, files[found], self._label(files))

    def _label(self, files: dict[str, bytes]) -> int | str:
        key, field = self.settings.label_key, self.settings.label_field
        stored: Any = files.get(key or "", b"-1")
        try:
            stored = json.loads(stored) if key == "json" else int(stored)
        except (ValueError, RecursionError):
            return label_of(stored) if key != "json" else -1
        return label_of(stored.get(field) if isinstance(stored, dict) else stored)


def find_tars(pattern: str) -> list[str]:
    """The tars that a folder, a pattern or a URL stands for, in a fixed order.

    Raises:
        UserError: if there are none, or a local one is missing.
    """
    from webdataset.shardlists import expand_urls

    if not _SCHEME.match(pattern):
        pattern = str(expanded(pattern))
        if os.path.isdir(pattern):
            found = sorted(entry.path for entry in os.scandir(pattern) if entry.name.endswith(TARS))
        elif glob.has_magic(pattern) and "{" not in pattern:
            found = sorted(glob.glob(pattern))
        else:
            found = expand_urls(pattern)
            missing = next((path for path in found if not os.path.exists(path)), None)
            if missing is not None:
                raise NotAtHand(f"data.urls {pattern!r}: {missing!r} does not exist")
        if not found:
            kind = UserError if os.path.isdir(pattern) else NotAtHand
            raise kind(f"data.urls {pattern!r} has no tar: give a folder, a pattern or a list of tars")
        return found
    return list(expand_urls(pattern))


_DAMAGE = "/damage"
"""In the place of an extension, which has no slash: why the tar ends here."""


class _Member(tarfile.TarInfo):
    """Tells the tar why there is no next member: tarfile takes damage between two of them for the end."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ended_by = error
            raise


def _files(stream: IO[bytes]) -> Iterator[tuple[str, str, bytes]]:
    """Regular files of a tar: key, extension and content; at last what ends it early, if something does."""
    from webdataset.tariterators import base_plus_ext

    last_key = None
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                # A tar remembers all of its members otherwise.
                tar.members = []  # type: ignore[attr-defined]
                key, extension = base_plus_ext(member.name)
                if not member.isreg() or key is None or _META.match(member.name):
                    continue
                last_key = key
                file = tar.extractfile(member)
                assert file is not None
                yield key, extension.lower(), file.read()
            ended_by = getattr(tar, "ended_by", None)
            if not isinstance(ended_by, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise tarfile.ReadError(str(ended_by))
    except tarfile.ReadError as error:
        while stream.read(1 << 20):
            pass
        # A command or a connection that has failed says so now: then it is no damage, and may pass.
        stream.close()
        if last_key is None:
            raise
        reason = f"the tar is damaged or ends early here ({' '.join(str(error).split())})"
        yield last_key, _DAMAGE, reason.encode()
