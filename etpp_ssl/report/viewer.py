"""Images in the eyes of a model: which are shown, what it sees of them and what it predicts, as panels.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.given import viewed
from etpp_ssl.data.sources.base import printable
from etpp_ssl.data.sources.found import find_images
from etpp_ssl.data.sources.splits import keyed_indices
from etpp_ssl.data.views import EvalView, Normalise, by_lanczos, has_gaps
from etpp_ssl.report.panels import ChannelView, Panel, target_panels
from etpp_ssl.report.reconstruction import Decoding, Reconstruction, check_bandwidth
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.weights.loading import load_trained


@dataclass(frozen=True)
class InputImage:
    """An image in the evaluation view."""

    name: str
    number: int
    """Keys its mask; of the run's own data, the number in its split."""
    pixels: Tensor
    """(C, H, W), see `etpp_ssl.data.views.View`."""


class ImagePanels(NamedTuple):
    """Everything there is to see of one image."""

    crops: list[Panel]
    """The low-frequency crop at every bandwidth of the curriculum; last the image."""
    masked: Panel
    predictions: list[Panel]
    """The one that shows it best first; empty where the target cannot be drawn."""
    reconstruction: Reconstruction


@dataclass(frozen=True, kw_only=True)
class Viewer(Decoding):
    """A model on the CPU, and what it takes to show its images."""

    normalise: Normalise
    channels: ChannelView
    image_size: tuple[int, int]
    """(H, W)."""
    bandwidths: list[tuple[int, int]]
    """Of the curriculum's stages."""

    @classmethod
    def of_run(cls, run: RunFolder, seed: int | None = None) -> Viewer:
        """A run's model, without its weights yet.

        Args:
            run: the run.
            seed: of the masks; None takes the run's, and so the masks of the reconstruction probe.

        Raises:
            UserError: if this is not a run folder.
        """
        recipe = run.recipe()
        with torch.random.fork_rng(devices=[]):
            model = recipe.build_model().eval()
        masker = recipe.build_masker()
        return cls(
            model=model,
            target=recipe.target,
            masker=masker if seed is None else replace(masker, seed=seed),
            normalise=recipe.normaliser(torch.device("cpu")),
            channels=ChannelView(*recipe.data.statistics(recipe.in_chans)),
            image_size=recipe.size,
            # The steps depend on the number of images, the bandwidths do not.
            bandwidths=[stage.bandwidth for stage in recipe.build_curriculum(1).stages],
            lanczos=recipe.curriculum.crop == "lanczos",
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's weights.

        Raises:
            UserError: if it is of another model, or gone: a run in progress removes old ones.
        """
        load_trained(self.model, checkpoint)

    def look(self, image: InputImage, bandwidth: tuple[int, int] | None = None) -> ImagePanels:
        """Show an image to the model, masked, at a bandwidth; None is the full image.

        The mask is the one that the reconstruction probe draws for the image's number.

        Raises:
            UserError: for a bandwidth that is not a whole number of patches within the image, or leaves no
                visible or no masked patch.
        """
        bandwidth = bandwidth or self.image_size
        check_bandwidth(bandwidth, self.image_size, self.model.patch_size)
        found = self.predict(self.crop(image, bandwidth), image.number, self._has_data(image, bandwidth))
        note = f"{found.ids_removed.shape[1]} of {found.grid[0] * found.grid[1]} patches removed"
        at = "" if bandwidth == self.image_size else f", bandwidth {show_size(bandwidth)}"
        return ImagePanels(
            self.crops(image),
            Panel(f"masked input{at}", note, self.channels(found.visible())),
            target_panels(self.target, found, self.channels),
            found,
        )

    def crop(self, image: InputImage, bandwidth: tuple[int, int]) -> Tensor:
        """What the model sees of an image at a bandwidth, normalised: float32 (1, C, Bh, Bw)."""
        return low_frequency_crop(self.normalise(self._resized(image, bandwidth)[None]), bandwidth)

    def _resized(self, image: InputImage, bandwidth: tuple[int, int]) -> Tensor:
        """The view as a worker gives it, (C, H, W) or, with Lanczos, (C, Bh, Bw)."""
        resize = self.lanczos and bandwidth != self.image_size
        return by_lanczos(image.pixels, bandwidth) if resize else image.pixels

    def _has_data(self, image: InputImage, bandwidth: tuple[int, int]) -> Tensor | None:
        """bool (1, 1, Bh, Bw), pixels of the crop with data; None where all have."""
        pixels = self._resized(image, bandwidth)[None]
        return pixels_with_data(pixels, bandwidth) if has_gaps(pixels) else None

    def crops(self, image: InputImage) -> list[Panel]:
        """The image at every bandwidth of the curriculum; last the image itself."""
        full, panels = self.image_size, []
        for bandwidth in dict.fromkeys([*self.bandwidths, full]):
            if bandwidth == full:
                title, note = f"image, {show_size(full)}", "all frequencies"
            else:
                title = f"bandwidth {show_size(bandwidth)}"
                note = f"{area_share(bandwidth, full):.0%} of the pixels"
            panels.append(Panel(title, note, self.channels(self.crop(image, bandwidth)[0])))
        return panels


def images_of_run(run: RunFolder, count: int) -> tuple[list[InputImage], str]:
    """A few images of a run's own data, and the split they are from: "evaluation" or "training".

    A keyed draw, since the first images of sorted class folders are all of one class. Unreadable ones
    are passed over.

    Raises:
        UserError: if the data is not there.
    """
    recipe = run.recipe()
    try:
        source, split = recipe.open_split("eval"), "evaluation"
    except UserError:
        source, split = recipe.open_split("train"), "training"
    view = EvalView(recipe.size, recipe.data.crop_pct, recipe.data.channel_sampling, recipe.seed)
    images: list[InputImage] = []
    # As many again in reserve for unreadable ones.
    for index in keyed_indices(len(source), 2 * count, recipe.seed, "pictures"):
        try:
            pixels = view(source.open(index), index, recipe.size)
        except UnreadableImage:
            continue
        images.append(InputImage(source.name(index), index, pixels))
        if len(images) == count:
            break
    if not images:
        raise UserError(f"no image of the {split} data can be read")
    return images, split


def images_of_files(
    paths: Sequence[Path],
    count: int,
    *,
    view: EvalView,
    reading: Reading,
    say: Callable[[str], None] = print,
) -> list[InputImage]:
    """Images from files, and up to `count` from each folder, numbered in this order.

    Args:
        paths: files and folders.
        count: images of a folder at most.
        view: how they are resized and cropped.
        reading: how the files become pictures.
        say: told of folders that hold more images.

    Raises:
        UserError: if a path does not exist, a folder has no images, or an image cannot be read or has
            other channels than the run's.
    """
    images = []
    for number, file in enumerate(_files(paths, count, say)):
        pixels = viewed(file, number, view, reading)
        images.append(InputImage(printable(str(file)), number, pixels))
    return images


def _files(paths: Sequence[Path], count: int, say: Callable[[str], None]) -> Iterator[Path]:
    for path in paths:
        if os.path.isdir(path):
            try:
                inside = find_images(path).paths()
            except OSError as error:
                raise UserError(f"image folder {str(path)!r} cannot be read: {error.strerror}") from error
            if not inside:
                raise UserError(f"image folder {str(path)!r} has no images in it")
            if len(inside) > count:
                say(f"{count} of the {len(inside):,} images of {str(path)!r}; --count takes more")
            yield from (path / name for name in inside[:count])
        elif os.path.exists(path):
            yield path
        else:
            raise UserError(f"image {str(path)!r} does not exist")
