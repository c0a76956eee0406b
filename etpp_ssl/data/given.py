"""Images that a Python caller hands over: files, PIL images, arrays and tensors.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.formats import finished, open_file
from etpp_ssl.data.formats.base import Picture, Reading, UnreadableImage
from etpp_ssl.data.formats.npy import from_array
from etpp_ssl.data.formats.pillow import opened_picture
from etpp_ssl.data.views import EvalView

AnyImage = str | os.PathLike | Image.Image | np.ndarray | Tensor
"""A file, a PIL image, an array (H, W) or (H, W, C) of uint8 or uint16, or normalised values (C, H, W)."""
KINDS = (
    "an image is a path, a PIL image, an array (H, W) or (H, W, C) of uint8 or uint16, or a float tensor "
    "(C, H, W) of normalised values"
)


def each(images: AnyImage | Iterable[AnyImage]) -> Iterator[AnyImage]:
    """The images of one or several; an array (N, H, W, C) and a tensor (N, C, H, W) are N images.

    Raises:
        UserError: if it is neither.
    """
    is_batch = isinstance(images, np.ndarray | Tensor) and images.ndim == 4
    if isinstance(images, AnyImage) and not is_batch:
        yield images
    elif isinstance(images, Iterable):
        yield from images
    else:
        raise UserError(f"images is of type {type(images).__name__}; {KINDS}; several of them are a list")


def viewed(image: AnyImage, number: int, view: EvalView, reading: Reading) -> Tensor:
    """An image's evaluation view, read as a data source reads its files.

    Args:
        image: a file, a PIL image or an array.
        number: of the image among those given, which names it in messages.
        view: how it is resized and cropped.
        reading: as that of the training images, each of which has a file of its own here; see
            `etpp_ssl.data.formats.open_picture`.

    Returns:
        (C, H, W), see `View`.

    Raises:
        UserError: naming the file, or the number of the image, if it cannot be read so.
    """
    try:
        return view(_picture(image, number, reading.of_one), number, view.image_size)
    except UnreadableImage as error:
        name = repr(os.fspath(image)) if isinstance(image, str | os.PathLike) else str(number)
        raise UserError(f"image {name} cannot be read: {error}") from error


def _picture(image: AnyImage, number: int, reading: Reading) -> Picture:
    if isinstance(image, str | os.PathLike):
        return open_file(os.path.expanduser(image), reading)
    if isinstance(image, Image.Image):
        return finished(opened_picture(image, reading.stored), reading)
    if isinstance(image, np.ndarray):
        return _of_array(image, reading)
    raise UserError(f"image {number} is of type {type(image).__name__}; {KINDS}")


def _of_array(array: np.ndarray, reading: Reading) -> Picture:
    try:
        return finished(from_array(array, reading.stored), reading)
    except UnreadableImage as error:
        hint = ""
        if array.dtype.kind == "f":
            hint = "; normalised values are given as a tensor (C, H, W)"
        elif (
            reading.in_chans in (1, 3)
            and array.dtype == np.uint8
            and (array.ndim == 2 or array.shape[2:] in ((3,), (4,)))
        ):
            hint = "; PIL.Image.fromarray(array) makes an image of it, whose channels are converted"
        raise UnreadableImage(f"{error}{hint}") from error
