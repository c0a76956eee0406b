"""What all processes of a run must agree on: where it starts, and at every step signals and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from etpp_ssl.config import UserError

OF_A_MACHINE = {"output", "data.root", "data.num_workers", "data.prefetch"}
"""Settings that machines may differ in: paths, and what suits their processors."""


class Agreement:
    """Tells all processes of a signal that one received, and of a checkpoint that rank 0 wants.

    The exchange runs on the CPU over gloo, so that it never waits for a GPU, and learns at once that another
    process has ended.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.alone = accelerator.num_processes == 1
        self.is_main = accelerator.is_main_process
        self._group: Any = None
        # A new group waits its whole time limit for a process that has ended before: none where one will do.
        if not self.alone and dist.get_backend() != "gloo":
            handler = accelerator.init_handler
            self._group = dist.new_group(backend="gloo", timeout=handler.timeout if handler else None)

    def reach(self, signum: int, checkpoint_due: bool) -> tuple[int, bool]:
        """(signal that any process received or 0, whether rank 0 wants a checkpoint)."""
        if self.alone:
            return signum, checkpoint_due
        votes = torch.tensor([signum, int(checkpoint_due and self.is_main)])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return int(votes[0]), bool(votes[1])

    def main_says(self, text: str) -> str:
        """The main process's text, on all; every process must call it."""
        if self.alone:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, src=0, group=self._group)
        return texts[0]


def agree_on_start(
    accelerator: Accelerator, recipe: Mapping[str, Any], where: Mapping[str, Any], *, is_stream: bool
) -> None:
    """See that all processes have opened the same run; every process must call it.

    Each has read folder and data for itself. File systems of several machines may show one of them an older
    state, or another folder altogether, and the processes would wait for each other for ever.

    Args:
        accelerator: of the run.
        recipe: this process's recipe, as nested dicts.
        where: what else must be the same: step, number of steps, data.
        is_stream: whether the images are a stream, of which every data worker reads its own part.

    Raises:
        UserError: on all processes, if they have not.
    """
    if accelerator.num_processes == 1:
        return
    exempt = OF_A_MACHINE - {"data.num_workers"} if is_stream else OF_A_MACHINE
    main, *others = gather_object([{**where, **_flat(recipe)}])
    for process, there in enumerate(others, 1):
        for what in [*main, *(there.keys() - main.keys())]:
            if there.get(what) != main.get(what) and what not in exempt:
                raise UserError(
                    f"process {process} has opened another run than process 0: {what} {there.get(what)!r} "
                    f"instead of {main.get(what)!r}; output {recipe['output']!r}, recipe and data must be "
                    f"the same for all"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
