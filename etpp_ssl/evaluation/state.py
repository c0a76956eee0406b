"""The state of a probe that takes hours: one file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from etpp_ssl.atomic import replaced_file
from etpp_ssl.config import UserError


class ProbeState:
    """Head, optimizer and step of a probe, so that it goes on bitwise where it was interrupted.

    Args:
        file: where; None keeps nothing.
        head: the trained part.
        optimizer: its optimizer.
    """

    def __init__(self, file: Path | None, head: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.file = file
        self.head = head
        self.optimizer = optimizer

    def load(self) -> int:
        """Put the file's tensors, if there is one, into head and optimizer; returns its step, or 0.

        Raises:
            UserError: if it is damaged.
        """
        if self.file is None or not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, framework="pt") as file:
                step = int(file.metadata()["step"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"probe state {str(self.file)!r} is damaged ({error}); remove it to start the probe again"
            ) from error
        head: dict[str, Tensor] = {}
        slots: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "head":
                head[name] = tensor
            else:
                number, _, slot = name.partition(".")
                slots.setdefault(int(number), {})[slot] = tensor
        self.head.load_state_dict(head)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        return step

    def save(self, step: int) -> None:
        """Write the state after `step` steps.

        Raises:
            UserError: if the disk is full or cannot be written to; the older state is intact.
        """
        if self.file is not None:
            with replaced_file(self.file) as aside:
                save_file(self._tensors(), aside, metadata={"step": str(step)})

    def remove(self) -> None:
        """The probe is done."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"head.{name}": tensor for name, tensor in self.head.state_dict().items()}
        for number, slots in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{number}.{slot}": tensor for slot, tensor in slots.items()}
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def state_key(encoder: nn.Module, **protocol: Any) -> str:
    """What a state belongs to, as 12 hexadecimal digits: the encoder's tensors, and all that is named.

    Args:
        encoder: every tensor of its state dict counts, to the last bit.
        protocol: what JSON can hold.
    """
    digest = hashlib.blake2b(json.dumps(protocol, sort_keys=True).encode(), digest_size=6)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
