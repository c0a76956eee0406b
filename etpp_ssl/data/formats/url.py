"""Files at URLs (`https://`, `s3://`, `gs://` ...), read whole through fsspec.

A file that is not there is an unreadable image. A connection that fails is none: after a few tries the run
stops, as it would go on with other images than the next time.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from typing import Any

from etpp_ssl.config import NotAtHand, RunFault
from etpp_ssl.data.formats.base import UnreadableImage, require_library

RETRIES = 3
RETRY_SECONDS = 1.0
"""Pause before a file is opened again; twice as long each further time."""
_URL = re.compile(r"[a-z][a-z0-9+.:-]+://", re.IGNORECASE)
_LASTING = (FileNotFoundError, IsADirectoryError, PermissionError)
"""What trying again does not change."""


def is_url(name: str) -> bool:
    """Whether a file's name is a URL; fsspec's chains (`simplecache::s3://...`) are, too."""
    return _URL.match(name) is not None


def check_urls(key: str, starts: Sequence[str]) -> None:
    """Check that URLs can be opened here, as far as their schemes tell.

    Args:
        key: of the recipe, which names them.
        starts: what URLs have before `://`: a scheme, or a chain of them.

    Raises:
        NotAtHand: if fsspec, or the library behind a scheme, is missing.
    """
    if starts:
        require_library(f"{key} with URLs", "fsspec", "url")
    for scheme in sorted({scheme for start in starts for scheme in start.split("::")}):
        try:
            _fsspec().get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise NotAtHand(f"{key} has URLs of {scheme}://, which fsspec does not open: {error}") from error


def read_url(url: str, at_most: int) -> bytes:
    """A file's bytes.

    Raises:
        UnreadableImage: if it is not there, may not be read, or has more than `at_most` bytes.
        RunFault: if it cannot be read for another reason, after a few tries.
    """
    for failures in range(RETRIES + 1):
        try:
            with _fsspec().open(url, "rb") as file:
                data: bytes = file.read(at_most + 1)
            break
        except _LASTING as error:
            raise UnreadableImage(f"it cannot be opened ({type(error).__name__})") from error
        except Exception as error:
            # The libraries behind each kind of storage raise what they like.
            if failures == RETRIES:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise RunFault(f"{url!r} cannot be read after {RETRIES + 1} tries ({reason})") from error
        time.sleep(RETRY_SECONDS * 2**failures)
    if len(data) > at_most:
        raise UnreadableImage(f"it has more than {at_most:,} bytes")
    return data


def _fsspec() -> Any:
    return importlib.import_module("fsspec")
