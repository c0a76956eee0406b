"""Tiny streams for tests: tars, parquet files and mixes of them, whose labels number the images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from etpp_ssl.data.streams.base import StreamConfig
from etpp_ssl.data.streams.huggingface import HuggingFaceConfig
from etpp_ssl.data.streams.mix import HuggingFacePart, MixConfig, WebDatasetPart
from etpp_ssl.data.streams.webdataset import WebDatasetConfig

SHARD_SIZES = (5, 3, 6, 4, 5, 7, 1)
"""Seven shards, of 31 images in all."""
NUM_IMAGES = sum(SHARD_SIZES)
BUFFER = 4


@cache
def png(number: int) -> bytes:
    """An image that is no other number's."""
    noise = np.random.default_rng(number).integers(0, 256, (20 + number % 5, 22, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(["RGB", "L", "P", "RGBA"][number % 4]).save(file, "png")
    return file.getvalue()


def shards_of(sizes: Sequence[int], first: int = 0) -> list[range]:
    """The numbers of the images in each shard."""
    starts = [first + sum(sizes[:place]) for place in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def write_tar(path: Path, numbers: Iterable[int], broken: Iterable[int] = ()) -> Path:
    """A tar of samples `img/NUMBER` with an image and a label each; the broken images end in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = png(number)[:60] if number in broken else png(number)
            for name, content in ((f"{number:03d}.png", data), (f"{number:03d}.cls", str(number).encode())):
                member = tarfile.TarInfo(f"img/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_tars(folder: Path, first: int = 0, broken: Iterable[int] = ()) -> Path:
    """Seven tars."""
    for place, numbers in enumerate(shards_of(SHARD_SIZES, first)):
        write_tar(folder / f"{place}.tar", numbers, broken)
    return folder


def write_parquets(folder: Path, first: int = 0, broken: Iterable[int] = ()) -> Path:
    """Seven parquet files."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    for place, numbers in enumerate(shards_of(SHARD_SIZES, first)):
        images = [png(n)[:60] if n in broken else png(n) for n in numbers]
        rows = {"image": [{"bytes": data, "path": None} for data in images], "label": list(numbers)}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        table = datasets.Dataset.from_dict(rows, features=features).data.table
        # Through pyarrow: the library's own writer shows a progress bar.
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, folder / f"{place}.parquet")
    return folder


def webdataset(root: Path, broken: Iterable[int] = ()) -> StreamConfig:
    """Tars in a folder."""
    folder = write_tars(root / "tars", broken=broken)
    return WebDatasetConfig(urls=str(folder), num_images=NUM_IMAGES, shuffle_buffer=BUFFER)


def huggingface(root: Path, broken: Iterable[int] = ()) -> StreamConfig:
    """Parquet files."""
    files = str(write_parquets(root / "parquet", broken=broken) / "*.parquet")
    return HuggingFaceConfig(path="parquet", data_files=files, num_images=NUM_IMAGES, shuffle_buffer=BUFFER)


def mix(root: Path, broken: Iterable[int] = ()) -> StreamConfig:
    """Tars with images 0 to 30 and parquet files with images 100 to 130, two to one."""
    tars = write_tars(root / "tars", broken=broken)
    files = write_parquets(root / "parquet", first=100, broken=[100 + n for n in broken])
    return MixConfig(
        sources=(
            WebDatasetPart(urls=str(tars), shuffle_buffer=BUFFER, weight=2.0),
            HuggingFacePart(path="parquet", data_files=str(files / "*.parquet"), shuffle_buffer=3),
        ),
        num_images=NUM_IMAGES,
    )


EXAMPLES: dict[str, Callable[..., StreamConfig]] = {
    "webdataset": webdataset,
    "huggingface": huggingface,
    "mix": mix,
}
"""By the stream's `name`."""
