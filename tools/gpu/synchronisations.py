"""Count where the host would wait for a GPU, on a machine without one.

On a CPU every tensor is the host's, so the counter remembers which memory would be a GPU's: that of the
tensors it is told of, of what is copied to a device or made there, and of every result of these. It notes
each operation that reads such a tensor's values (`item`, `tolist`, `nonzero`, an index by a mask, a copy to
the host) and each copy to the device that blocks. It cannot see whether the source of a copy is pinned.

A device is a `torch.device`; the text "cpu" means the host.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etpp_ssl.train.launch import launch
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.run import Run

PACKAGE = "etpp_ssl"
AT_LEISURE = {"log_row", "save", "synchronise", "evaluate_and_record", "prepare_run", "write_dump"}
"""Functions of the package that may wait: rows, checkpoints, evaluations, the start, a dump."""
ATEN = torch.ops.aten
READS = {
    ATEN._local_scalar_dense, ATEN.nonzero, ATEN.nonzero_numpy, ATEN.masked_select, ATEN.equal, ATEN.bincount,
    ATEN._unique2, ATEN.unique_dim, ATEN.unique_consecutive,
}  # fmt: skip
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
UPLOADS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.to, Tensor.cuda}


class WaitCounter:
    """Inside, notes the waits of this thread, backward passes included.

    Args:
        on_device: tensors that would be on the device.
    """

    def __init__(self, on_device: Iterable[Tensor] = ()) -> None:
        self.waits: list[str] = []
        """For each, the operation and the line of the package that called it."""
        # A weak reference keeps the address from being used again.
        self._device_memory: dict[int, StorageWeakRef] = {}
        self._modes = (_Functions(self), _Operations(self))
        for tensor in on_device:
            self.mark(tensor)

    def __enter__(self) -> WaitCounter:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def mark(self, tensor: Tensor) -> None:
        """Take a tensor for one of the device."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._device_memory:
            self._device_memory[storage._cdata] = StorageWeakRef(storage)

    def forget(self, tensor: Tensor) -> None:
        """Take a tensor for one of the host."""
        self._device_memory.pop(tensor.untyped_storage()._cdata, None)

    def holds(self, tensor: Any) -> bool:
        """Whether it is a tensor of the device."""
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._device_memory

    def note(self, operation: str) -> None:
        """Remember a wait, unless it is where waiting is right."""
        frame: FrameType | None = sys._getframe(1)
        place = ""
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if PACKAGE in file.parts:
                if frame.f_code.co_name in AT_LEISURE:
                    return
                place = place or f"{file.parent.name}/{file.name}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        self.waits.append(f"{operation} in {place or 'a library'}")


class _Operations(TorchDispatchMode):
    """Sees every operation, those of C++ and of backward passes, too."""

    def __init__(self, counter: WaitCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter, kwargs = self.counter, kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(counter.holds(tensor) for tensor in tensors)
        packet = func.overloadpacket
        if on_device and packet in READS:
            counter.note(packet.__name__)
        elif on_device and packet in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                counter.note(f"{packet.__name__} by a mask")
            elif not all(counter.holds(index) for index in indices):
                counter.note(f"{packet.__name__} by a tensor of the host")
        elif packet is ATEN.copy_ and counter.holds(args[0]) != counter.holds(args[1]):
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if blocking and args[1].ndim:
                counter.note("blocking copy_")
            on_device = counter.holds(args[0])
        result = func(*args, **kwargs)
        if on_device:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    counter.mark(leaf)
        return result


class _Functions(TorchFunctionMode):
    """Sees what is said of devices, and reads that are no operation."""

    def __init__(self, counter: WaitCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counter, kwargs = self.counter, kwargs or {}
        from_device = bool(args) and counter.holds(args[0])
        device = kwargs.get("device")
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            device = args[1]
        if func in TO_HOST or (func in UPLOADS and device == "cpu" and isinstance(device, str)):
            if from_device and not kwargs.get("non_blocking", False):
                counter.note(func.__name__)
            return func(*args, **kwargs)
        if device == "cpu" and isinstance(device, str):
            made = func(*args, **kwargs)
            counter.forget(made)
            return made
        if not isinstance(device, torch.device):
            return func(*args, **kwargs)
        if func not in UPLOADS:
            return self._marked(func(*args, **kwargs))
        if from_device:
            return func(*args, **kwargs)
        if not kwargs.get("non_blocking", False):
            counter.note(f"{func.__name__} to the device")
        # On a CPU the copy would be the original, which stays the host's.
        return self._marked(func(*args, **kwargs).clone())

    def _marked(self, result: Any) -> Any:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.counter.mark(leaf)
        return result


@contextmanager
def warned() -> Iterator[WaitCounter]:
    """Inside, torch itself tells of what makes the host wait for a GPU, and a counter notes it.

    It tells of neither `synchronize` nor an event's; these are only where they are meant.
    """
    counter = WaitCounter()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning

        def note(message: Warning | str, *others: Any) -> None:
            if "synchroniz" in str(message):
                counter.note("a wait")
            else:
                shown(message, *others)

        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counter
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits_of_steps(run: Run) -> list[list[str]]:
    """Train a run that was opened, and tell the waits of each step: on a CPU, those that a GPU would have.

    Those of a stage's first step are left out: it makes the tables of its size, and copies them once.
    """
    steps: list[list[str]] = []
    on_gpu = run.accelerator.device.type == "cuda"
    held = [*run.bare_model.parameters(), *run.bare_model.buffers()]
    with warned() if on_gpu else WaitCounter(held) as counter:

        def step_done(run: Run) -> None:
            done = run.curriculum.stage_at(run.state.step - 1)
            steps.append([] if done.first_step == done.step else counter.waits.copy())
            counter.waits.clear()

        on_step_end.append(step_done)
        try:
            launch(run)
        finally:
            on_step_end.remove(step_done)
    return steps
