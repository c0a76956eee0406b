"""Reading what others wrote: regular files only, and no more of them than can be meant.

Opening a named pipe waits for someone to write to it, a device may never end, and a file can be larger
than the memory: each of them is an error here, before a byte of it is read.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 1 << 16


def read_regular(path: str | os.PathLike[str], at_most: int) -> bytes:
    """The bytes of a file.

    Args:
        path: the file; links are followed.
        at_most: bytes.

    Raises:
        OSError: with a `strerror` for people, if it cannot be read, is no regular file, or is larger.
        ValueError: if the path holds a null byte.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > at_most:
            raise OSError(errno.EFBIG, f"its {size:,} bytes are more than {at_most:,}")
        return _all(descriptor, size, at_most)
    finally:
        os.close(descriptor)


def open_regular(path: str | os.PathLike[str]) -> int:
    """A descriptor of a file, for reading.

    Raises:
        OSError: as `read_regular`.
        ValueError: if the path holds a null byte.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        require_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_text(path: Path, at_most: int, *, errors: str = "strict") -> str:
    """The same as text in UTF-8, with or without a byte order mark.

    Raises:
        OSError: as `read_regular`.
        ValueError: if it is no UTF-8, unless `errors` says what becomes of it.
    """
    return read_regular(path, at_most).decode("utf-8-sig", errors)


def require_regular(status: os.stat_result) -> None:
    """Check what `os.stat` or `os.fstat` found.

    Raises:
        OSError: if it is no regular file.
    """
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def _all(descriptor: int, size: int, at_most: int) -> bytes:
    parts, found = [], 0
    # One byte more than it has tells the end; files of /proc say that they have none.
    while part := os.read(descriptor, max(size + 1 - found, _BLOCK)):
        parts.append(part)
        found += len(part)
        if found > at_most:
            raise OSError(errno.EFBIG, f"it grew beyond {at_most:,} bytes while it was read")
    return parts[0] if len(parts) == 1 else b"".join(parts)
