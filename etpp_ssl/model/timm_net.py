"""Any timm network for supervised training: its arguments, its stride, and the sizes at which it runs.

Everything is found out on torch's meta device, where a network has shapes and no numbers: this takes about a
tenth of a second, whatever the network's size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import etpp_ssl.model.zoo.cswin
import etpp_ssl.model.zoo.pvt  # noqa: F401  These two register what timm lacks.
from etpp_ssl.config import UserError, as_pair, show_size
from etpp_ssl.messages import close_names, shown
from etpp_ssl.model.timm_layers import key_drop_path
from etpp_ssl.model.zoo.swin import make_resizable
from etpp_ssl.randomness import ShapesOnly

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
    for cls in type(_named(architecture)).__mro__:
        if cls is nn.Module:
            break
        names.update(inspect.signature(cls).parameters)
    return frozenset(names - {"args", "kwargs"})


def is_vit(architecture: str) -> bool:
    """Whether it is timm's VisionTransformer, DeiT's among them."""
    return isinstance(_named(architecture), VisionTransformer)


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
    net = meta_net(architecture, args)
    keys = key_drop_path(net, seed=0)
    keys.set_sample_ids(torch.zeros(2, dtype=torch.int64, device="meta"))
    for size in dict.fromkeys([image_size, *bandwidths]):
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
def _named(architecture: str) -> nn.Module:
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
        config: Any = _named(architecture).pretrained_cfg
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
    return isinstance(_named(architecture), SwinTransformer)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
