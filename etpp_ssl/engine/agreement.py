"""What all processes must be of one mind about: where a run starts, and once per step whether it goes on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from etpp_ssl.config import UserError
from etpp_ssl.engine.run import BaseRun


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


def agree_on_start(run: BaseRun) -> None:
    """See that all processes have opened the same run; every process must call it.

    Each has read folder and data for itself. File systems of several machines may show one of them an older
    state, or another folder altogether, and the processes would wait for each other for ever.

    Raises:
        UserError: on all processes, if they have not.
    """
    if run.accelerator.num_processes == 1:
        return
    here = {
        "step": run.state.step,
        "number of steps": run.curriculum.num_steps,
        "data": run.data_fingerprint,
        "recipe": {key: value for key, value in run.recipe.model_dump().items() if key != "output"},
    }
    for process, there in enumerate(gather_object([here])):
        if process == 0:
            main = there
        for what, value in there.items():
            if value != main[what]:
                raise UserError(
                    f"process {process} has opened another run than process 0: {what} {value!r} instead of "
                    f"{main[what]!r}; output {run.recipe.output!r}, recipe and data must be the same for all"
                )
