"""What every export does: read the run's newest weights, and find the folder to write."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder, load_weights

CARD_FILE = "README.md"


@dataclass(frozen=True)
class TrainedModel:
    """A run's model with the weights of its newest whole checkpoint."""

    run: RunFolder
    recipe: Recipe
    step: int
    model: MaskedAutoencoder

    @classmethod
    def read(cls, run_dir: str | Path, say: Callable[[str], None]) -> TrainedModel:
        """Read it, on the CPU.

        Args:
            run_dir: the run.
            say: told of damaged checkpoints that are passed over.

        Raises:
            UserError: if there is no run or no checkpoint.
        """
        run = RunFolder(run_dir)
        recipe = run.recipe()
        checkpoint = run.trained(say)
        with torch.random.fork_rng(devices=[]):
            model = recipe.build_model()
        weights = load_weights(model.state_dict(), checkpoint.model(), f"checkpoint {checkpoint.path}")
        model.load_state_dict(weights)
        return cls(run, recipe, checkpoint.step, model)


def export_folder(run: RunFolder, out: str | Path | None, target: str, marker: str) -> Path:
    """The folder to write: `out`, or `RUN/export/<target>`.

    Args:
        run: the run.
        out: chosen by the user, or None.
        target: the format.
        marker: the file that shows that a folder is an earlier export of it.

    Raises:
        UserError: if it is no folder, or holds something else.
    """
    # With a name of its own, which `.` has not.
    folder = Path(os.path.abspath(out)) if out is not None else run.path / "export" / target
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; choose another name")
    if folder.exists() and not (folder / marker).is_file() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} holds something that is no export; choose another folder")
    return folder


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them: each with memory of its own, in order."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
