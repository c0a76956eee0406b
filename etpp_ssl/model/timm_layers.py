"""timm's layers with two changes: drop-path that is keyed by the sample, attention with a kernel of choice.

timm draws drop-path from torch's global generator, so its draws depend on all draws before: on the batch
size, on the process, on where a run was resumed. Here a decision is a function of the seed, the module's
number in the network and the sample's number in the run. Rates and scaling are timm's.

Legend: B batch, M drop-path modules of the network, N tokens, H heads, D head width, E = H D.
"""

from __future__ import annotations

from typing import Any, cast

from einops import rearrange
from timm.layers import Attention, DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.model.attention import AttentionName, CrossAttention, is_fused, unfused_attention
from etpp_ssl.randomness import keyed_words

PURPOSE = "drop_path"
_BITS = 63
"""Of a word: without the sign bit, int64 compares like the unsigned number."""


class DropPathKeys:
    """What all drop-path modules of a network share: the seed, and the samples in the batch.

    Args:
        seed: the run's seed.
        num_modules: M.
    """

    def __init__(self, seed: int, num_modules: int) -> None:
        self.seed = seed
        self.num_modules = num_modules
        self._sample_ids_B: Tensor | None = None
        self._words: Tensor | None = None

    def set_sample_ids(self, sample_ids_B: Tensor | None) -> None:
        """Set the samples, int64 (B,), of the next forward pass or recomputation."""
        self._sample_ids_B = sample_ids_B
        self._words = None

    def words(self, column: int, num_samples: int) -> Tensor:
        """Random words in [0, 2^63), int64 (B,), for one drop-path decision per sample.

        Raises:
            UserError: if the samples' numbers are missing, or are not one for each row.
        """
        if self._sample_ids_B is None:
            raise UserError(
                "drop-path is keyed by sample: pass sample_ids_B to Classifier.forward in training"
            )
        if len(self._sample_ids_B) != num_samples:
            raise UserError(
                f"drop-path sees {num_samples} rows for {len(self._sample_ids_B)} sample_ids_B: it must be "
                "applied to whole samples, with one number for each"
            )
        if self._words is None or column >= self._words.shape[1]:
            # One draw for all modules; more columns only for modules that are called more than once.
            num_draws = self.num_modules * (column // self.num_modules + 1)
            words = keyed_words(self.seed, PURPOSE, self._sample_ids_B, num_draws)
            self._words = words & ((1 << _BITS) - 1)
        return self._words[:, column]


class KeyedDropPath(DropPath):
    """timm's drop-path with keyed draws; `key_drop_path` turns timm's modules into it.

    A module that a block calls several times in its forward pass draws anew each time, as timm's does.
    """

    keys: DropPathKeys
    number: int
    calls: int

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, ...): whole samples set to zero, the others scaled by 1 / keep rate."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        column = self.number + self.calls * self.keys.num_modules
        self.calls += 1
        words_B = self.keys.words(column, len(x))
        factor = (words_B >= drop_threshold(self.drop_prob)).to(x.dtype)
        keep_prob = 1 - self.drop_prob
        if keep_prob > 0 and self.scale_by_keep:
            factor = factor / keep_prob
        return x * factor.view(-1, *(1,) * (x.ndim - 1))


def drop_threshold(drop_prob: float) -> int:
    """A sample is dropped where its word in [0, 2^63) is below this integer, the same on every device.

    Args:
        drop_prob: in [0, 1).
    """
    return int(drop_prob * 2.0**_BITS)


def key_drop_path(net: nn.Module, seed: int) -> DropPathKeys:
    """Key every active timm DropPath of a network, in place, in the order of `net.modules()`.

    The modules change their class, as `torch.nn.utils.parametrize` does: names and hooks stay.

    Returns:
        The keys, which must be told each batch's samples.
    """
    named = [(name, cast(KeyedDropPath, m)) for name, m in net.named_modules() if type(m) is DropPath]
    active = [(name, module) for name, module in named if module.drop_prob > 0]
    keys = DropPathKeys(seed, len(active))
    for number, (name, module) in enumerate(active):
        module.__class__ = KeyedDropPath
        module.keys, module.number, module.calls = keys, number, 0
        # A recomputation (gradient checkpointing) runs whole blocks again, which must count from 0, too. Any
        # module above may be the one that is called, because some call the parts of others directly.
        path = name.split(".")
        for length in range(len(path)):
            above = net.get_submodule(".".join(path[:length]))
            above.register_forward_pre_hook(_CountAnew(module))
    return keys


def drop_path_rates(net: nn.Module) -> dict[str, float]:
    """The effective rate of every drop-path module of a network by its name; inactive ones are 0."""
    return {name: float(m.drop_prob) for name, m in net.named_modules() if isinstance(m, DropPath)}


class _CountAnew:
    """A forward pre-hook of a block that resets its drop-path's count of calls; it can be copied."""

    def __init__(self, module: KeyedDropPath) -> None:
        self.module = module

    def __call__(self, owner: nn.Module, inputs: Any) -> None:
        self.module.calls = 0


class SelfAttention(Attention):
    """timm's attention, which in training takes the kernel of choice; in evaluation it is timm's to the bit.

    Query norms, gates and attention dropout are left to timm altogether. `use_attention` makes them.
    """

    kernel: AttentionName

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, E) to (B, N, E); further arguments, such as a mask, are timm's."""
        # timm's blocks hand on a mask that is None, under names that differ between its versions.
        no_mask = all(value is None or value is False for value in (*args, *kwargs.values()))
        if not self.training or not no_mask or not self._has_no_extras():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        qkv = self.qkv(x)
        if is_fused(self.kernel, qkv.device.type, qkv.dtype, qkv.shape[1]):
            q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
            mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        else:
            mixed = unfused_attention(qkv, self.num_heads)
        return self.proj_drop(self.proj(mixed))  # type: ignore[no-any-return]

    def _has_no_extras(self) -> bool:
        norms = (self.q_norm, self.k_norm, getattr(self, "norm", nn.Identity()))
        identity = all(isinstance(norm, nn.Identity) for norm in norms)
        return identity and self.attn_drop.p == 0 and getattr(self, "gate", None) is None


def use_attention(module: nn.Module, kernel: AttentionName) -> None:
    """Let every plain attention below `module` take this kernel in training.

    timm's modules change their class in place, as `torch.nn.utils.parametrize` does it: parameters, their
    names and hooks stay, so that timm builds the networks and loads the weights.
    """
    for attention in module.modules():
        if type(attention) is Attention:
            attention.__class__ = SelfAttention
        if isinstance(attention, SelfAttention | CrossAttention):
            attention.kernel = kernel
