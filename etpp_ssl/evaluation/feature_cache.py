"""Features kept beside a run: a second probe of the same weights on the same images need not extract them.

Only those of images in files are kept, whose sizes and times tell whether they are the same, and only by one
process. A file is used again where everything that its numbers come from is as it was: see `_key`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from etpp_ssl import __version__
from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.folder import FileSource
from etpp_ssl.data.sources.splits import Subset
from etpp_ssl.evaluation.features import (
    EvaluationLoader,
    Features,
    Pool,
    Precision,
    extract_features,
    forward_pass,
    num_features,
    pooled_features,
    run_precision,
)
from etpp_ssl.files import replaced_file, save_tensors

MOST_BYTES = 1 << 29
"""That the files of a folder take together. The oldest ones go, and larger features are not kept."""
FREE_TIMES = 20
"""Nothing is kept on a disk that has less than so many times as much free."""


def kept_features(
    folder: Path | None,
    loader: EvaluationLoader,
    encoder: nn.Module,
    source: ImageSource,
    indices: Sequence[int],
    *,
    pool: Pool | None,
    batch_size: int,
    precision: Precision | None,
    say: Callable[[str], None],
) -> Features:
    """What `extract_features` gives, from a file in `folder` where an earlier call has left it.

    Args:
        folder: of the files; None keeps none.
        loader, encoder, source, indices, pool, batch_size, precision: see `extract_features`.
        say: told of a file that is used.
    """

    def extracted() -> Features:
        return extract_features(
            loader, encoder, source, indices, pool=pool, batch_size=batch_size, precision=precision
        )

    too_many = 4 * num_features(encoder) * len(indices) > MOST_BYTES
    if folder is None or too_many or loader.accelerator.num_processes > 1:
        return extracted()
    images = _images_key(source, indices)
    if images is None:
        return extracted()
    file = folder / f"{_key(loader, encoder, images, pool, batch_size, precision)}.safetensors"
    with suppress(OSError, SafetensorError, TypeError):
        features = Features(**load_file(file, device=str(loader.accelerator.device)))
        # The files that were used last stay.
        os.utime(file)
        say(f"{len(indices):,} images: features of an earlier probe, from {file}")
        return features
    features = extracted()
    # An image that cannot be read today may be tomorrow.
    if len(features.indices) == len(indices):
        with suppress(OSError, UserError):
            _keep(file, features)
    return features


def _keep(file: Path, features: Features) -> None:
    size = sum(rows.numel() * rows.element_size() for rows in features)
    file.parent.mkdir(parents=True, exist_ok=True)
    if size > MOST_BYTES or shutil.disk_usage(file.parent).free < FREE_TIMES * size:
        return
    there = sorted(file.parent.glob("*.safetensors"), key=lambda other: other.stat().st_mtime)
    while there and size + sum(other.stat().st_size for other in there) > MOST_BYTES:
        there.pop(0).unlink()
    with replaced_file(file) as aside:
        save_tensors({name: rows.cpu().contiguous() for name, rows in features._asdict().items()}, aside, {})


@torch.inference_mode()
def _key(
    loader: EvaluationLoader,
    encoder: nn.Module,
    images: str,
    pool: Pool | None,
    batch_size: int,
    precision: Precision | None,
) -> str:
    """Hash of the weights, the images, the view and the software.

    What the encoder makes of a picture tells its structure apart, which the weights do not have in them, and
    statistics, pooling, precision and device.
    """
    device = loader.accelerator.device
    black = torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device)
    shape = torch.Size((1, loader.normalise(black).shape[1], *loader.view.image_size))
    picture = (torch.arange(shape.numel(), device=device) % 251).to(torch.uint8).reshape(shape)
    with forward_pass(encoder, device, precision or run_precision(loader.accelerator)):
        answer = pooled_features(encoder, loader.normalise(picture), pool).float()
    return state_key(
        encoder,
        images=images,
        view=repr(loader.view),
        answer=hashlib.blake2b(_bytes(answer), digest_size=12).hexdigest(),
        batch_size=batch_size,
        versions=[__version__, str(torch.__version__), PIL.__version__],
    )


def _images_key(source: ImageSource, indices: Sequence[int]) -> str | None:
    """Hash of the files' places, names, labels, sizes and times; None where images are not files."""
    digest = hashlib.blake2b(digest_size=12)
    for index in indices:
        whole, number = source, index
        while isinstance(whole, Subset):
            number = int(whole.indices[number])
            whole = whole.source
        if not isinstance(whole, FileSource):
            return None
        file = whole.folder.absolute() / whole.files[number]
        try:
            found = os.stat(file)
        except (OSError, ValueError):
            return None
        digest.update(os.fsencode(file) + b"\0")
        digest.update(f"{index} {source.label(index)} {found.st_size} {found.st_mtime_ns}\n".encode())
        digest.update(f"{whole.reading}\n".encode())
    return digest.hexdigest()


def state_key(encoder: nn.Module, **protocol: Any) -> str:
    """Hash of what a state belongs to, the encoder's tensors and a protocol, as 12 hexadecimal digits.

    Args:
        encoder: every tensor of its state dict counts, to the last bit.
        protocol: what JSON can hold.
    """
    digest = hashlib.blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=6)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
