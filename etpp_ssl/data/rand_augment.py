"""RandAugment (Cubuk et al., NeurIPS 2020): timm's operations, every draw keyed by the sample.

timm draws from the global generators of Python and numpy: during a call both are seeded with the
sample's key, and restored afterwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Interpolation
from etpp_ssl.data.resize import KERNELS
from etpp_ssl.data.views import to_channels, to_tensor
from etpp_ssl.randomness import derive_key

if TYPE_CHECKING:
    from timm.data.auto_augment import RandAugment as TimmRandAugment

RAMP_STAGES = 10
"""Equal shares of compute; within each, the magnitude of a ramp is constant."""
SECTIONS = {
    "m": r"\d+",
    "n": r"[1-9]",
    "p": r"0|1|0?\.\d+|1\.0*",
    "mstd": r"\d+(\.\d*)?|\.\d+",
    "mmax": r"[1-9]\d*",
    "inc": r"[01]",
    "t": r"weights|3a|3aw",
}
"""What may follow `rand-`, each at most once: timm's keys and the values that it understands."""
DEFAULT_MAGNITUDE = 10
"""timm's, of a string without `m`."""


class RandAugment:
    """Two (or `n`) operations per picture, a function of (seed, sample_id, progress) alone.

    Args:
        config: timm's string, for instance "rand-m9-mstd0.5-inc1".
        ramp: whether the magnitude grows from 0 to that of the string, in `RAMP_STAGES` equal shares of
            compute (the published code of EfficientTrain++: 0 to 9). Its noise, `mstd`, stays.
        mean: the data's, of values in [0, 1]; fills what a shift or a rotation uncovers.
        image_size: (H, W) at full bandwidth.
        interpolation: of rotations and shears; `box` takes bicubic there.
        seed: the run's seed.

    Raises:
        UserError: for a string that timm would misread, or for other than 1 or 3 channels.
    """

    def __init__(
        self,
        config: str,
        *,
        ramp: bool,
        mean: tuple[float, ...],
        image_size: tuple[int, int],
        interpolation: Interpolation,
        seed: int,
    ) -> None:
        if len(mean) not in (1, 3):
            raise UserError(
                f"augment.rand_augment needs gray or RGB pictures, and in_chans is {len(mean)}: "
                f"use augment.rand_augment=null"
            )
        try:
            sections = rand_augment_sections(config)
        except ValueError as error:
            raise UserError(f"augment.rand_augment: {error}") from None
        self.seed = seed
        self.ramp = ramp
        fill = tuple(min(255, round(255 * value)) for value in mean)
        hparams: dict[str, object] = {
            "translate_const": int(min(image_size) * 0.45),
            "img_mean": fill if len(fill) == 3 else fill[0],
            # Pillow's affine transforms have no box kernel.
            "interpolation": KERNELS["bicubic" if interpolation == "box" else interpolation],
        }
        last = int(sections.get("m", DEFAULT_MAGNITUDE))
        magnitudes = [last * stage / (RAMP_STAGES - 1) for stage in range(RAMP_STAGES)] if ramp else [last]
        self._stages = [_at_magnitude(config, hparams, magnitude) for magnitude in magnitudes]

    def __call__(self, view: Tensor, sample_id: int, progress: float) -> Tensor:
        """A distorted copy.

        Args:
            view: uint8 (C, H, W), C 1 or 3, of any size.
            sample_id: the sample's number in the run.
            progress: share of the run's compute spent before the step, in [0, 1].
        """
        stage = min(int(progress * RAMP_STAGES), RAMP_STAGES - 1) if self.ramp else 0
        (picture,) = to_channels(view)
        with global_draws(derive_key(self.seed, "rand_augment", sample_id)):
            return to_tensor((self._stages[stage](picture),))


def rand_augment_sections(config: str) -> dict[str, str]:
    """The sections of timm's string by key.

    Raises:
        ValueError: for a section that timm does not know, or knows and silently ignores.
    """
    name, *parts = config.split("-")
    found: dict[str, str] = {}
    for part in parts:
        match = re.fullmatch(r"(t)(.*)|([a-z]+)([\d.].*)", part)
        key, value = (match[1] or match[3], match[2] or match[4] or "") if match else (part, "")
        if key in found or not re.fullmatch(SECTIONS.get(key, r"(?!)"), value):
            break
        found[key] = value
    if name != "rand" or len(found) < len(parts):
        raise ValueError(
            f"{config!r} is not a setting of timm's RandAugment; 'rand-m9-mstd0.5-inc1' is one, and the "
            f"sections after 'rand', each at most once, are mMAGNITUDE, nOPERATIONS (1 to 9), pPROBABILITY, "
            f"mstdNOISE, mmaxLIMIT, inc0 or inc1, tweights, t3a or t3aw"
        )
    return found


@contextmanager
def global_draws(key: int) -> Iterator[None]:
    """Seed the global generators of Python and numpy with a 64-bit key, and restore them afterwards."""
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _at_magnitude(config: str, hparams: dict[str, object], magnitude: float) -> TimmRandAugment:
    from timm.data.auto_augment import posterize, rand_augment_transform

    # A string holds whole magnitudes only. timm writes what the string says into hparams.
    transform = rand_augment_transform(config, dict(hparams))
    for operation in transform.ops:
        operation.magnitude = magnitude
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(picture: Image.Image, bits: int, **others: object) -> Image.Image:
    """timm's posterize, but black where no bit is kept, which Pillow 13 refuses.

    At the default magnitude this happens in one call of forty: noise lifts the magnitude to 10.
    """
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    from timm.data.auto_augment import posterize

    kept: Image.Image = posterize(picture, bits)
    return kept
