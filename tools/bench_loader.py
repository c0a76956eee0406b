"""Time the training views against torchvision's pipeline, and measure the error of a reduced decode.

    taskset -c 1 python tools/bench_loader.py FOLDER [--enlarge] [--images 64] [--rounds 6] [--decode reduced]

One process and one thread; both go over the same files in turns, after a warm-up, and read them from the
page cache. torchvision's side ends with normalised floats; ours with uint8, because the device normalises.
torchvision's crops have its default scale, from 0.08 of the area on; ours have MAE's, from 0.2 on.
The goals that are printed beside the ratios are for JPEGs of 500 x 375 pixels and about 110 kB, as
ImageNet's are: `--enlarge` makes such files out of smaller ones, four to a sheet. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import PIL
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.formats.base import Channels, Decoder, Picture, Reading, Region
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.loader import BatchBuilder
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.sources.folder import FileSource
from etpp_ssl.data.sources.found import find_images
from etpp_ssl.data.views import TrainView

SIZE = (224, 224)
GOALS = {96: 1.75, 160: 1.4, 224: 1.15}
"""Wanted speed-up by bandwidth."""
BATCH_SIZE = 32
SHEET, SHEET_BYTES = (500, 375), 110_000

Paths = list[Path]


def main() -> None:
    """Parse, time, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="images, nested at will")
    parser.add_argument("--enlarge", action="store_true", help="use sheets of 500 x 375 made from them")
    parser.add_argument("--images", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="timings (default: %(default)s)")
    parser.add_argument("--decode", choices=("full", "reduced"), default="reduced")
    parser.add_argument("--interpolation", choices=("bicubic", "bilinear", "box"), default="bicubic")
    parser.add_argument("--decoder", choices=("pillow", "simplejpeg"), default="pillow")
    parser.add_argument("--crop", choices=("fourier", "lanczos"), default="fourier")
    options = parser.parse_args()
    if min(options.images, options.rounds) < 1:
        parser.error("--images and --rounds take 1 or more")
    torch.set_num_threads(1)
    settings = {name: getattr(options, name) for name in ("decode", "interpolation", "decoder")}

    with files_of(options.folder, options.images, enlarge=options.enlarge) as files:
        if not files:
            parser.error(f"no image below {options.folder}")
        size = statistics.mean(file.stat().st_size for file in files) / 1000
        print(f"{len(files)} files of {size:.0f} kB on average, the first one {Image.open(files[0]).size}")
        print(f"Pillow {PIL.__version__}, torch {torch.__version__}, {options.rounds} rounds in turns")
        print(", ".join(f"{key} {value}" for key, value in {**settings, "crop": options.crop}.items()))
        for bandwidth in GOALS:
            view = TrainView(SIZE, (0.2, 1.0), True, options.crop == "lanczos", 0, **settings)
            print(f"\nbandwidth {bandwidth}")
            compare_speed(files, view, bandwidth, options.rounds)
            if options.decode == "reduced":
                measure_error(files, view, bandwidth)


def compare_speed(files: Paths, view: TrainView, bandwidth: int, rounds: int) -> None:
    """Print images per second of both, and the ratio."""
    theirs: list[float] = []
    ours: list[float] = []
    passes: list[tuple[Callable[[], None], list[float]]] = [
        (lambda: torchvision_pass(files), theirs),
        (lambda: our_pass(files, view, bandwidth), ours),
    ]
    for number in range(-1, rounds):
        # Turns change places, so that neither profits from what the other leaves in the caches.
        for run, times in passes if number % 2 else passes[::-1]:
            start = time.perf_counter()
            run()
            if number >= 0:
                times.append(time.perf_counter() - start)
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    print(f"  torchvision      {spread([len(files) / t for t in theirs])} images/s")
    print(f"  etpp_ssl         {spread([len(files) / t for t in ours])} images/s")
    print(f"  ratio, pairwise  {spread(ratios)}   goal {GOALS[bandwidth]:g}")


def torchvision_pass(files: Paths) -> None:
    """Batches of the usual pipeline, at full size in every stage."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    for start in range(0, len(files), BATCH_SIZE):
        torch.stack([pipeline(default_loader(str(file))) for file in files[start : start + BATCH_SIZE]])


def our_pass(files: Paths, view: TrainView, bandwidth: int) -> None:
    """Batches as a data worker builds them."""
    builder = BatchBuilder(source_of(files), view, KeyedOrder(len(files), 0))
    for start in range(0, len(files), BATCH_SIZE):
        rows = tuple(range(start, min(start + BATCH_SIZE, len(files))))
        builder[BatchRequest(0, rows, rows, (bandwidth, bandwidth), 0.0, 1.0, False)]


class Watched:
    """A picture that notes whether it was decoded at a reduced resolution."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self.size = picture.size
        self.reduced = False

    def region(
        self, box: tuple[int, int, int, int], at_least: tuple[int, int], decoder: Decoder = "pillow"
    ) -> Region:
        """That of the picture."""
        region = self.picture.region(box, at_least, decoder)
        self.reduced = region.box[2] - region.box[0] < box[2] - box[0]
        return region

    def channels(self) -> Channels:
        """Those of the picture."""
        return self.picture.channels()


def measure_error(files: Paths, view: TrainView, bandwidth: int) -> None:
    """Print the share of reduced decodes, and the PSNR after the crop to the bandwidth."""
    source = source_of(files)
    full = TrainView(SIZE, view.crop_scale, view.flip, view.lanczos, view.seed, "full", view.interpolation)
    shown = (bandwidth, bandwidth)
    decode_alone, all_reduced, all_others = [], [], []
    for index in range(len(files)):
        picture = Watched(source.open(index))
        found = shown_frequencies(view(picture, index, shown), shown)
        whole = DecodedPicture(source.open(index).channels())
        against_full = psnr(found, shown_frequencies(full(whole, index, shown), shown))
        if picture.reduced:
            all_reduced.append(against_full)
            decode_alone.append(psnr(found, shown_frequencies(view(whole, index, shown), shown)))
        else:
            all_others.append(against_full)
    print(f"  decode reduced   {len(all_reduced) / len(files):7.0%} of the images")
    print(f"  PSNR of those    {mean_spread(all_reduced)} dB against decode=full")
    print(f"                   {mean_spread(decode_alone)} dB against the same view of a full decode")
    print(f"  PSNR of others   {mean_spread(all_others)} dB against decode=full")


def shown_frequencies(view: Tensor, bandwidth: tuple[int, int]) -> Tensor:
    """What the model sees of a view, in levels of 0 to 255."""
    return low_frequency_crop(view.float(), bandwidth)


def psnr(found: Tensor, wanted: Tensor) -> float:
    """In dB for values of 0 to 255; at most 100, for equal ones."""
    error = torch.mean((found - wanted) ** 2).clamp(min=1e-10 * 255**2)
    return float(10 * torch.log10(255**2 / error))


def source_of(files: Paths) -> FileSource:
    """The files without labels, as RGB."""
    return FileSource(Path("/"), [str(file.absolute()) for file in files], None, None, Reading(3))


@contextmanager
def files_of(folder: Path, count: int, *, enlarge: bool) -> Iterator[Paths]:
    """Evenly spread files of a folder, or temporary sheets made from them."""
    found = find_images(folder).paths()
    needed = 4 * count if enlarge else count
    chosen = [folder / name for name in islice(found, 0, None, max(1, len(found) // needed))][:needed]
    if not enlarge:
        yield chosen
        return
    with tempfile.TemporaryDirectory() as sheets:
        yield [
            write_sheet(Path(sheets) / f"{number:04d}.jpg", chosen[4 * number : 4 * number + 4])
            for number in range(len(chosen) // 4)
        ]


def write_sheet(path: Path, files: Paths) -> Path:
    """Four pictures on a JPEG of 500 x 375, at the quality that comes nearest to 110 kB."""
    sheet = Image.new("RGB", (448, 448))
    for number, file in enumerate(files):
        tile = Image.open(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        sheet.paste(tile, (224 * (number % 2), 224 * (number // 2)))
    sheet = sheet.resize(SHEET, Image.Resampling.LANCZOS)
    path.write_bytes(min((encoded(sheet, q) for q in range(70, 99, 4)), key=_distance))
    return path


def encoded(picture: Image.Image, quality: int) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _distance(data: bytes) -> int:
    return abs(len(data) - SHEET_BYTES)


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


def mean_spread(values: list[float]) -> str:
    """Mean, smallest and largest."""
    if not values:
        return "      -"
    return f"{statistics.mean(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
