"""Any timm network for supervised training: its arguments, its stride, and the sizes at which it runs.

Everything is found out on torch's meta device, where a network has shapes and no numbers: this takes about a
tenth of a second, whatever the network's size.

Two of its layers are changed: attention has a kernel of choice, and drop-path is keyed by the sample. timm
draws it from torch's global generator, so that a draw depends on all draws before: on the batch size, on the
process, on where a run was resumed. Here a decision is a function of the seed, the module's number in the
network and the sample's number in the run. Rates and scaling are timm's.

Legend: B batch, M drop-path modules of the network, N tokens, H heads, D head width, E = H D.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast

import timm
import torch
from einops import rearrange
from timm.layers import Attention, DropPath
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import etpp_ssl.model.zoo.cswin
import etpp_ssl.model.zoo.pvt  # noqa: F401  These two register what timm lacks.
from etpp_ssl.config import UserError, as_pair, show_size
from etpp_ssl.messages import close_names, shown
from etpp_ssl.model.attention import AttentionName, CrossAttention, is_fused, unfused_attention
from etpp_ssl.model.encoders import transformer_of
from etpp_ssl.model.zoo.swin import make_resizable
from etpp_ssl.randomness import ShapesOnly, keyed_words

DYNAMIC_SIZE = "dynamic_img_size"
"""timm's argument of networks that resample their position embedding in the forward pass."""

_BUILD_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, KeyError)
_RUN_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, IndexError)


def build_net(architecture: str, args: dict[str, Any]) -> nn.Module:
    """The timm network, initialised by timm from torch's global generator, at any legal size.

    Its parameters and buffers have the names and shapes of `timm.create_model(architecture, **args)`, and
    its outputs at base size are the same to the last bit.

    Raises:
        UserError: if timm does not know the name or refuses the arguments.
    """
    net = _create(architecture, **args, **size_switch(architecture))
    make_resizable(net)
    return net


def size_switch(architecture: str) -> dict[str, bool]:
    """timm's argument that has a network resample its positions, where it takes it.

    Swin's own switch pads windows; `make_resizable` leaves the stock network as it is.
    """
    resizes_itself = DYNAMIC_SIZE in accepted_arguments(architecture) and not _is_swin(architecture)
    return {DYNAMIC_SIZE: True} if resizes_itself else {}


def accepted_arguments(architecture: str) -> frozenset[str]:
    """Names of the arguments that the network's class takes by name."""
    names: set[str] = set()
    for cls in type(named_net(architecture)).__mro__:
        if cls is nn.Module:
            break
        names.update(inspect.signature(cls).parameters)
    return frozenset(names - {"args", "kwargs"})


def is_vit(architecture: str) -> bool:
    """Whether it is timm's VisionTransformer or Eva, or derived from one, as the distilled DeiT is."""
    return transformer_of(named_net(architecture)) is not None


def dimension_names(architecture: str) -> dict[str, str]:
    """timm's names of a transformer's dimensions that have others in a recipe; empty for other networks."""
    encoder = transformer_of(named_net(architecture))
    return {} if encoder is None else encoder.other_names


def stride(architecture: str, args: dict[str, Any]) -> tuple[int, int]:
    """The legal step of image sizes per axis, pixels: a ViT's patch, otherwise the total stride.

    Raises:
        UserError: if the network does not tell its stride.
    """
    net = meta_net(architecture, args)
    found = stride_of(net)
    if found is None or not getattr(net, "feature_info", None):
        raise UserError(f"model.name {architecture} does not tell its stride: take another network")
    return found


def stride_of(net: Any) -> tuple[int, int] | None:
    """Pixels per entry of a network's last map, and axis: a ViT's patch, otherwise the total stride.

    None where the network does not tell it.
    """
    info = getattr(net, "feature_info", None)
    total = int(info[-1]["reduction"]) if info else 0
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None) or total
    pair = as_pair(patch if isinstance(patch, int) else tuple(patch))
    # Networks with stages have a patch embedding too, finer than their total stride.
    return (pair if max(pair) >= total else (total, total)) if max(pair) else None


def check_sizes(
    architecture: str,
    args: dict[str, Any],
    *,
    image_size: tuple[int, int],
    in_chans: int,
    bandwidths: Iterable[tuple[int, int]],
) -> None:
    """Run the network's training pass at full resolution and at each bandwidth, on the meta device.

    Args:
        architecture, args: for `build_net`.
        image_size: (H, W) at full resolution.
        in_chans: C.
        bandwidths: (H, W) of each.

    Raises:
        UserError: if it cannot run at one of them, or draws random numbers that cannot be keyed.
    """
    passed = _passed(architecture, repr(sorted(args.items())), in_chans)
    sizes = [size for size in dict.fromkeys([image_size, *bandwidths]) if size not in passed]
    if not sizes:
        return
    net = meta_net(architecture, args)
    keys = key_drop_path(net, seed=0)
    keys.set_sample_ids(torch.zeros(2, dtype=torch.int64, device="meta"))
    for size in sizes:
        images = torch.empty(2, in_chans, *size, device="meta")
        draws = _SeededDraws()
        try:
            with draws, torch.no_grad():
                output = net(images)
        except _RUN_ERRORS as error:
            hint = "" if size == image_size else "; at full resolution it can (curriculum.name: constant)"
            raise UserError(
                f"model.name {architecture} cannot run at {show_size(size)} pixels "
                f"({_first_line(error)}){hint}"
            ) from error
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UserError(f"model.name {architecture} does not give one row of logits per image")
        if draws.found:
            names = sorted(
                n for n in accepted_arguments(architecture) if "drop" in n and n != "drop_path_rate"
            )
            raise UserError(
                f"model.name {architecture} draws random numbers in training by {draws.found[0]}, which "
                f"cannot be keyed by sample: set {', '.join(names) or 'its dropout'} to 0 in model.args, or "
                "take another network"
            )
        passed.add(size)


@lru_cache(maxsize=64)
def _passed(architecture: str, args: str, in_chans: int) -> set[tuple[int, int]]:
    """Sizes that passed `check_sizes`: a run that starts asks for each of them three times."""
    return set()


def meta_net(architecture: str, args: dict[str, Any]) -> nn.Module:
    """The network of `build_net` on the meta device, in training mode."""
    with ShapesOnly():
        return build_net(architecture, args).train()


class _SeededDraws(TorchDispatchMode):
    """Collects the operators that draw from torch's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in str(func):
            # Fused attention carries the tag for its dropout, which is a module of its own in timm.
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@lru_cache(maxsize=16)
def named_net(architecture: str) -> nn.Module:
    """The network with timm's own arguments, on the meta device."""
    base = architecture.split(".")[0]
    if not timm.is_model(base):
        hint = close_names(base, timm.list_models(), _would_do)
        raise UserError(f"model.name {shown(architecture)} is not a timm model{hint}")
    with ShapesOnly():
        return _create(architecture)


def _would_do(architecture: str) -> bool:
    """Whether a network trains at the size that it was made for, and at the smallest published bandwidth."""
    try:
        config: Any = named_net(architecture).pretrained_cfg
        in_chans, height, width = config["input_size"]
        step = stride(architecture, {})[0]
        early = max(step, 3 * min(height, width) // 7 // step * step)
        check_sizes(
            architecture,
            {},
            image_size=(height, width),
            in_chans=in_chans,
            bandwidths=[(early, early)],
        )
    except UserError:
        return False
    return True


def _create(architecture: str, **args: Any) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(architecture, pretrained=False, **args)
    except _BUILD_ERRORS as error:
        raise UserError(f"model.name {architecture} cannot be built: {_first_line(error)}") from error
    return net


def _is_swin(architecture: str) -> bool:
    return isinstance(named_net(architecture), SwinTransformer)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


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

    def keep_for_backward(self, output: Tensor, sample_ids_B: Tensor | None) -> None:
        """Let the backward pass of an output, which recomputes blocks, have its samples.

        It may come after another forward pass.
        """
        if output.requires_grad:
            output.register_hook(lambda _: self.set_sample_ids(sample_ids_B))

    def words(self, column: int, num_samples: int) -> Tensor:
        """Random words in [0, 2^63), int64 (B,), for one drop-path decision per sample.

        Raises:
            UserError: if the samples' numbers are missing, or are not one for each row.
        """
        if self._sample_ids_B is None:
            raise UserError(
                "drop-path is keyed by sample: pass sample_ids_B to the model's forward in training"
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
