"""Which images a report shows, and what the model gets of them.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.formats.decode import most_bytes
from etpp_ssl.data.formats.picture import open_picture
from etpp_ssl.data.sources.base import ImageSource, UnreadableImage
from etpp_ssl.data.sources.folder import image_files, printable
from etpp_ssl.data.sources.splits import keyed_indices, open_split
from etpp_ssl.data.views import EvalView, Normalise, to_bands, to_tensor
from etpp_ssl.files import read_regular
from etpp_ssl.recipe import Recipe


@dataclass(frozen=True)
class Picture:
    """An image in the evaluation view."""

    name: str
    number: int
    """Keys its mask; of the run's own data, the number in its split."""
    pixels: Tensor
    """uint8 (C, H, W)."""


class Crops:
    """Pictures as a run's model sees them at a bandwidth.

    Args:
        recipe: the run's; its kind of crop and its normalisation are used.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.lanczos = recipe.curriculum.crop == "lanczos"
        self.size = recipe.size
        self.normalise = Normalise(*recipe.data.statistics(recipe.in_chans), torch.device("cpu"))

    def __call__(self, picture: Picture, bandwidth: tuple[int, int]) -> Tensor:
        """Normalised float32 (1, C, Bh, Bw)."""
        pixels = picture.pixels
        if self.lanczos and bandwidth != self.size:
            size = (bandwidth[1], bandwidth[0])
            bands = to_bands(pixels)
            pixels = to_tensor(tuple(band.resize(size, Image.Resampling.LANCZOS) for band in bands))
        return low_frequency_crop(self.normalise(pixels[None]), bandwidth)


def pictures_of_run(recipe: Recipe, count: int) -> tuple[list[Picture], str]:
    """A few images of the run's own data, and the split they are from: "evaluation" or "training".

    A keyed draw, since the first images of sorted class folders are all of one class. Unreadable ones
    are passed over.

    Raises:
        UserError: if the data is not there.
    """
    try:
        source, split = _open(recipe, "eval"), "evaluation"
    except UserError:
        source, split = _open(recipe, "train"), "training"
    view = EvalView(recipe.size, recipe.data.crop_pct)
    pictures: list[Picture] = []
    # As many again in reserve for unreadable ones.
    for index in keyed_indices(len(source), 2 * count, recipe.seed, "pictures"):
        try:
            pixels = view(source.open(index), index, recipe.size)
        except UnreadableImage:
            continue
        pictures.append(Picture(source.name(index), index, pixels))
        if len(pictures) == count:
            break
    if not pictures:
        raise UserError(f"no image of the {split} data can be read")
    return pictures, split


def pictures_of_files(paths: Sequence[Path], recipe: Recipe, count: int) -> list[Picture]:
    """Images from files, and up to `count` from each folder, numbered in this order.

    Raises:
        UserError: if a path does not exist, a folder has no images, or an image cannot be read or has
            other channels than the recipe's `in_chans`.
    """
    view, max_pixels = EvalView(recipe.size, recipe.data.crop_pct), recipe.data.max_pixels
    pictures = []
    for number, file in enumerate(_files(paths, count)):
        try:
            data = read_regular(file, most_bytes(max_pixels, recipe.in_chans))
            image = open_picture(data, recipe.in_chans, max_pixels)
            pixels = view(image, number, recipe.size)
        except (OSError, UnreadableImage) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"image {str(file)!r} cannot be read: {reason}") from error
        pictures.append(Picture(printable(str(file)), number, pixels))
    return pictures


def _open(recipe: Recipe, split: str) -> ImageSource:
    return open_split(recipe.data, split, in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed)


def _files(paths: Sequence[Path], count: int) -> Iterator[Path]:
    for path in paths:
        if os.path.isdir(path):
            try:
                inside = sorted(image_files(path))[:count]
            except OSError as error:
                raise UserError(f"image folder {str(path)!r} cannot be read: {error.strerror}") from error
            if not inside:
                raise UserError(f"image folder {str(path)!r} has no images in it")
            yield from (path / name for name in inside)
        elif os.path.exists(path):
            yield path
        else:
            raise UserError(f"image {str(path)!r} does not exist")
