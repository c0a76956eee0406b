"""What all processes must be of one mind about, once per step and at every checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator


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
