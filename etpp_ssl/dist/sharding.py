"""Models whose tensors are spread over the processes: whole tensors out of their parts, and back.

Under FSDP2 every process holds its part of each parameter, gradient and optimizer state, as a `DTensor`.
Files hold whole tensors, so that a checkpoint does not tell how many processes wrote it, or how: it is read
by one process, by DDP and by FSDP2 alike. Evaluation runs on whole copies, because the processes evaluate
different numbers of images and a sharded forward pass needs all of them at every block.

What gathers or distributes is a collective: every process must call it, for the same tensors. Tensors that
are whole already pass through untouched, so callers need not know whether a run is sharded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


M = TypeVar("M", bound=nn.Module)


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors of the processes' parts, gathered one after the other; a collective.

    Args:
        tensors: under the same names on every process.
        keep: whether this process wants them. One that does not takes part, and never holds more than one.

    Returns:
        Those that were in parts on the CPU, the others as they were; nothing without `keep`.
    """
    found = {}
    # The order of a state dict is the model's; that of an optimizer's is its own.
    for name in sorted(tensors):
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            found[name] = tensor
    return found


def parted_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `own` is; a collective.

    Args:
        tensor: whole; the main process's is the one that counts.
        own: tells how. One that is whole itself, or of another shape, leaves the tensor whole.
    """
    if not isinstance(own, DTensor) or own.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


@torch.no_grad()
def own_parts(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of a model's `state_dict`; writing to it changes the model. No collective."""
    return {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
    }


class Copies:
    """Makes copies of a sharded model, which itself cannot be copied.

    Args:
        model: as it is before it is sharded; its parameters are not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        # deepcopy takes what its memo has for an object, so no parameter is held twice.
        without_numbers: dict[int, object] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in model.parameters()
        }
        self._blank = copy.deepcopy(model, without_numbers)

    def whole(self, model: M) -> M:
        """A plain model in eval mode with all of the weights, on the device of `model`; a collective.

        It takes the memory of an unsharded model on each process, for as long as it is held.
        """
        device = next(model.parameters()).device
        # The blank model's other buffers are where the model was before it was sharded.
        return self._filled(_gathered(model)).to(device)  # type: ignore[return-value]

    def parts(self, model: nn.Module) -> nn.Module:
        """A copy that has its parts as `model` has, for what is done element by element; it cannot be run."""
        return self._filled({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

    def _filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        filled = copy.deepcopy(self._blank)
        filled.load_state_dict(tensors, assign=True)
        return filled.train(False)


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
        for name, tensor in model.state_dict().items()
    }
