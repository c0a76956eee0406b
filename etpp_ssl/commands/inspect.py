"""`etpp inspect`: what values the images of a folder or a recipe hold, and the range to train them in."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from etpp_ssl.commands.extending import extending
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Reading, UnreadableImage
from etpp_ssl.data.proposal import Proposal, missing_value, propose
from etpp_ssl.data.sources.base import ImageSource, images_of
from etpp_ssl.data.sources.found import by_extension
from etpp_ssl.data.sources.splits import keyed_indices, open_split, read_anew
from etpp_ssl.data.sources.windows import TiledConfig
from etpp_ssl.data.statistics import Channel, Values, read_values
from etpp_ssl.data.streams.base import StreamConfig
from etpp_ssl.data.streams.sample import StreamSample
from etpp_ssl.files import check_place, write_text
from etpp_ssl.recipe import FinetuneRecipe, Recipe, any_of
from etpp_ssl.recipe_base import task_of
from etpp_ssl.recipe_file import RecipeText
from etpp_ssl.recipe_yaml import dump_yaml

QUANTILES = (0.001, 0.01, 0.5, 0.99, 0.999)
SHEET = "sheet.png"
TRIED = 32
"""Images that tell the number of channels."""
NAMED = 3
"""Of the images that cannot be read for one reason, as many are named."""
FOLDER_RECIPE = "output: unused\nbudget_epochs: 1\nbatch_size: 1\ndata: {name: folder, root: .}\n"
"""What stands for a recipe around a folder."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    source: ImageSource
    """The images, raw."""
    indices: list[int]
    """Those that were read, or are not readable."""
    values: Values
    nodata: float | None
    """The value of pixels without data."""
    proposal: Proposal | None
    """None where the images have no common range."""
    notes: list[str]
    """What a reader should know besides."""


def inspect(
    source: str,
    overrides: Sequence[str] = (),
    *,
    images: int = 2000,
    nodata: float | None = None,
    write: Path | None = None,
    out: Path | None = None,
) -> Inspection:
    """Read a sample of training images at full resolution and count their values.

    Args:
        source: a folder of images, a recipe's file or name, or a run's folder.
        overrides: `section.key=value` each.
        images: as many are drawn; 0 reads all of them.
        nodata: the value of pixels without data, in the place of `data.nodata`.
        write: a recipe to write, which extends the given one.
        out: folder of the sheet, which is not drawn here.

    Raises:
        UserError: if there are no images, none can be read, or there is nothing to write.
    """
    is_folder = os.path.isdir(source)
    if write is not None:
        if is_folder:
            raise UserError(
                f"--write needs a recipe to extend, and {source!r} is a folder: etpp inspect RECIPE "
                f"data.root=FOLDER --write FILE"
            )
        check_place(write)
    if out is not None:
        check_place(out / SHEET)
    stated = not is_folder or any(override.startswith("in_chans=") for override in overrides)
    recipe, has_range = _recipe(source, overrides)
    nodata = recipe.data.nodata if nodata is None else nodata
    reading = replace(recipe.data.reading(recipe.in_chans), range="raw", clip=False)
    found = _opened(recipe, images, reading)

    def drawn(source: ImageSource) -> list[int]:
        return keyed_indices(len(source), min(images or len(source), len(source)), recipe.seed, "inspect")

    files = drawn(found)
    in_chans, notes = _num_channels(found, files[:: max(1, len(files) // TRIED)], reading, stated=stated)
    if isinstance(found, StreamSample) and found.fault:
        notes.append(f"the sample ended early: {found.fault}")
    raw = read_anew(found, replace(reading, in_chans=in_chans))
    if isinstance(recipe.data, TiledConfig):
        raw = recipe.data.parts(raw)
    indices = drawn(raw)

    def read(what: str, nodata: float | None) -> Values:
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(what, total=len(indices))
            return read_values(
                raw,
                indices,
                nodata,
                pooled=reading.sampled,
                num_workers=recipe.data.num_workers,
                stall_seconds=recipe.data.stall_seconds,
                advance=lambda done: bar.advance(task, done),
            )

    values = read("inspect", nodata)
    if not values.num_images:
        reason, names = next(iter(values.unreadable.items()))
        raise UserError(f"none of the {images_of(len(indices))} can be read: {names[0]!r}: {reason}")
    missing = missing_value(values) if nodata is None else None
    if missing is not None:
        notes.append(
            f"{_shown(missing)} stands apart from all other values and is taken for pixels without data; "
            f"--nodata nan takes it for a value"
        )
        nodata, values = missing, read("without it", missing)
    if not any(values.channels.values()):
        raise UserError(f"no pixel of the {images_of(len(indices))} has data")
    if in_chans > min(values.sizes.most_common(1)[0][0]) and recipe.data.axes is None:
        notes.append("more channels than pixels on a side: data.axes=chw reads (channels, height, width)")
    kept = has_range and in_chans == recipe.in_chans
    given = recipe.data.reading(recipe.in_chans).range if kept else None
    proposal = propose(values, given, nodata)
    own = propose(values, None, nodata)
    if given is not None and own is not None and proposal is not None and own.range != proposal.range:
        text = "none" if own.range is None else str(own.layer()["data"]["range"])
        notes.append(f"data.range is the recipe's; data.range=null would have {text} proposed")
    if proposal is not None and values.pooled:
        count = recipe.in_chans
        proposal = replace(proposal, in_chans=count, mean=proposal.mean * count, std=proposal.std * count)
    if proposal is None:
        notes.append(
            f"images of {_and(values.channels)} have no common range: train on them apart, or convert them"
        )
    if write is not None and proposal is not None:
        comment = f"By `etpp inspect`, of {len(indices):,} of {images_of(len(raw))}."
        write_text(write, extending(source, overrides, write, proposal.layer(), comment))
    return Inspection(raw, indices, values, nodata, proposal, notes)


def _opened(recipe: Recipe | FinetuneRecipe, count: int, reading: Reading) -> ImageSource:
    """The training images: whole files, and of a stream as many as are asked for.

    Raises:
        UserError: if they are not there, or cannot be read.
    """
    if not isinstance(recipe.data, StreamConfig):
        return open_split(
            recipe.data,
            "train",
            in_chans=recipe.in_chans,
            image_size=recipe.size,
            seed=recipe.seed,
            parts=False,
        )
    if not count:
        raise UserError(
            f"--images 0 reads all, and data.name {recipe.data.name} is a stream: give the number of its "
            f"first images to read"
        )
    sample = StreamSample(recipe.data.open_stream(recipe.seed), count, reading)
    if not len(sample):
        raise UserError(f"the stream has no image{f': {sample.fault}' if sample.fault else ''}")
    return sample


def _recipe(source: str, overrides: Sequence[str]) -> tuple[Recipe | FinetuneRecipe, bool]:
    """The recipe, or one around a folder, and whether it states a range."""
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "recipe.yaml")):
        own = [f"data.root={os.path.abspath(source)}", *overrides]
        text = RecipeText.of(FOLDER_RECIPE, own, f"folder {source!r}")
    else:
        text = RecipeText.read(source, overrides)
    data = text.values(Recipe if task_of(text) == "pretrain" else FinetuneRecipe).get("data")
    if isinstance(data, dict) and data.get("range") is None:
        # Keys that need a range (nodata, tile, channel_sampling) are given before there is one.
        return any_of(replace(text, overrides=(*text.overrides, "data.range=dtype"))), False
    return any_of(text), True


def _num_channels(
    source: ImageSource, indices: Sequence[int], reading: Reading, *, stated: bool
) -> tuple[int, list[str]]:
    """The number of channels to read, and what to say of it: that of the files, unless the recipe's fits."""
    if reading.channels is not None or reading.sampled:
        return reading.in_chans, []

    def counted(wanted: int) -> Counter[int]:
        """How many images have how many channels, if so many are wanted, or as many as a file has for 0."""
        raw, found = read_anew(source, replace(reading, in_chans=wanted)), Counter[int]()
        for index in indices:
            try:
                found[raw.open(index).region((0, 0, 1, 1), (1, 1)).pixels.shape[2]] += 1
            except UnreadableImage:
                continue
        return found

    fitting = counted(reading.in_chans).total() if stated else 0
    if 2 * fitting > len(indices):
        return reading.in_chans, []
    own = counted(0)
    if not own or 2 * fitting > own.total():
        return reading.in_chans, []
    ((count, number),) = own.most_common(1)
    some = f" of {number} of {own.total()} images" if len(own) > 1 else ""
    note = f"in_chans is {reading.in_chans}, but the files have {count}{some}: {count} channels are read"
    return count, [note] if stated and count != reading.in_chans else []


def print_inspection(found: Inspection, console: Console) -> None:
    """What was found, for people; last the lines for a recipe."""
    values = found.values
    total = sum(values.num_images.values())
    console.print(f"{total:,} read of {found.source.describe()}", markup=False)
    (width, height), _ = values.sizes.most_common(1)[0]
    widths, heights = zip(*values.sizes, strict=True)
    size = f"{width} x {height} pixels"
    if len(values.sizes) > 1:
        size = f"{min(widths)} to {max(widths)} x {min(heights)} to {max(heights)} pixels, most {size}"
    kinds = ", ".join(f"{number:,} of {name}" for name, number in values.num_images.items())
    extensions = f"{by_extension(values.extensions)}; " if any(values.extensions) else ""
    console.print(f"{extensions}{size}; {kinds}", markup=False)
    if values.num_missing:
        share = values.num_missing / values.num_pixels
        console.print(f"without data: {_percent(share)} of the pixels", markup=False)
    for reason, names in values.unreadable.items():
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        named = ", ".join(map(repr, names[:NAMED]))
        console.print(f"cannot be read: {named}{more}: {reason}", markup=False)
    if values.pooled:
        console.print("all channels together, as data.channel_sampling draws them", markup=False)
    for name, channels in values.channels.items():
        if channels:
            _print_channels(name, channels, console)
    for note in found.notes:
        console.print(f"note: {note}", markup=False)
    if found.proposal is not None:
        print(f"\n{yaml_of(found.proposal)}", end="")


def _print_channels(name: str, channels: Sequence[Channel], console: Console) -> None:
    quantiles = Table(box=box.SIMPLE, title=f"{name}: values", title_justify="left")
    depth = Table(box=box.SIMPLE, title=f"{name}: depth", title_justify="left")
    for column in ("channel", "least", *(f"{100 * share:g} %" for share in QUANTILES), "most"):
        quantiles.add_column(column.replace("50 %", "median"), justify="right")
    for column in ("channel", "mean", "std", "bits used", "levels", "at the top"):
        depth.add_column(column, justify="right")
    for number, channel in enumerate(channels):
        marks = (channel.least, *(channel.quantile(share) for share in QUANTILES), channel.most)
        quantiles.add_row(str(number), *map(_shown, marks))
        mean, std = channel.moments()
        levels = channel.levels()
        depth.add_row(
            str(number),
            f"{mean:.5g}",
            f"{std:.5g}",
            _bits(channel),
            "" if levels is None else f"{levels:,}",
            _percent(channel.saturated),
        )
    console.print(quantiles)
    console.print(depth)


def yaml_of(proposal: Proposal) -> str:
    """The lines for a recipe."""
    text = dump_yaml(proposal.layer(), compact=True)
    if proposal.range is None:
        text += "# 8 bits need no data.range\n"
    if proposal.outside:
        text += (
            f"# {_percent(proposal.outside)} of the values lie outside of the range; data.clip=true moves "
            f"them to its ends\n"
        )
    return text


def _bits(channel: Channel) -> str:
    used = channel.used_bits
    if used is None:
        return ""
    lowest, number = used
    sign = " + sign" if channel.dtype.kind == "i" else ""
    shifted = f" from bit {lowest}" if lowest else ""
    return f"{number}{sign} of {8 * channel.dtype.itemsize}{shifted}"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.5g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _and(names: Sequence[str] | dict[str, Any]) -> str:
    return " and ".join(names)
