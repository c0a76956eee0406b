"""Keyed randomness: every draw is a function of (seed, purpose, position), never of earlier draws.

Python draws serve the data workers, tensor draws serve masks on any device. Both mix 64-bit words
with the splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014), in exact integer arithmetic, so
that CPU and GPU agree to the bit.

Legend: B batch, N draws per sample.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_Built = TypeVar("_Built")
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def derive_key(seed: int, purpose: str, *position: int) -> int:
    """A 64-bit key for one draw.

    Args:
        seed: the run's seed, any integer.
        purpose: what is drawn, for instance "crop"; different purposes are independent.
        position: integers that say where, for instance the sample's number in the run.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    key = _mix((seed ^ int.from_bytes(digest, "little")) & _MASK)
    for number in position:
        key = _mix((key + _GOLDEN + (number & _MASK)) & _MASK)
    return key


def keyed_random(seed: int, purpose: str, *position: int) -> random.Random:
    """Python's generator at a key: cheap to make, for a few scalar draws in a data worker."""
    return random.Random(derive_key(seed, purpose, *position))


def keyed_numpy(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A counter-based numpy generator at a key, for arrays."""
    return np.random.Generator(np.random.Philox(key=derive_key(seed, purpose, *position)))


def keyed_torch(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU torch generator at a key."""
    return torch.Generator().manual_seed(derive_key(seed, purpose, *position) >> 1)


def keyed_permutation(num_items: int, seed: int, purpose: str, *position: int) -> Tensor:
    """A keyed uniform permutation of 0 to `num_items` - 1, (num_items,): int32 where that is enough."""
    # torch draws the same one in both types.
    dtype = torch.int32 if num_items < 1 << 31 else torch.int64
    return torch.randperm(num_items, generator=keyed_torch(seed, purpose, *position), dtype=dtype)


def freshly_initialised(seed: int, build: Callable[[], _Built]) -> _Built:
    """What `build` makes, with the initial weights of a run's seed.

    Args:
        seed: the run's seed.
        build: makes a model and draws its weights from torch's global CPU generator, whose state is restored
            afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(seed, "init") >> 1)
        return build()


class ShapesOnly(TorchFunctionMode):
    """A context in which networks are built on the meta device, and not initialised.

    `torch.device("meta")` alone runs every draw and fill of the initialisation, to no effect, in most of the
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._meta = torch.device("meta")

    def __enter__(self) -> ShapesOnly:
        self._meta.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._meta.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


_FILLS = {
    getattr(Tensor, f"{name}_")
    for name in ("add", "clamp", "copy", "div", "erfinv", "fill", "mul", "normal", "sub", "uniform", "zero")
}


def keyed_words(seed: int, purpose: str, positions_B: Tensor, num_draws: int) -> Tensor:
    """Independent 64-bit words for many positions at once, on the positions' device.

    Args:
        seed: the run's seed.
        purpose: what is drawn.
        positions_B: int64 (B,), one position per row.
        num_draws: words per row.

    Returns:
        int64 (B, num_draws), uniform over all 2^64 bit patterns; row b depends on (seed, purpose,
        positions_B[b]) alone.
    """
    # derive_key of a single position, written out on tensors: the test holds the two together.
    start = derive_key(seed, purpose)
    rows = _mix_tensor(positions_B.to(torch.int64) + _signed(start + _GOLDEN))
    columns = torch.arange(num_draws, dtype=torch.int64, device=positions_B.device)
    return _mix_tensor(rows[:, None] + _signed(_GOLDEN) + columns)


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)


def _mix_tensor(words: Tensor) -> Tensor:
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    # int64 shifts keep the sign; the mask makes the shift a logical one.
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    word &= _MASK
    return word - (1 << 64) if word >> 63 else word
