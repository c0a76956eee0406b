"""Runs in processes of their own, cheaply, and killed at a moment that the test names.

A server imports torch and the package once, and forks one process per run. Each is a real process: it starts
from what is on disk, and its end is the kernel's doing. Moments:

    Line(n)     SIGKILL at the n-th line of the package that the main thread executes
    Call(...)   SIGKILL as a built-in function is called, or right after it has returned, inside a function
    Bytes(...)  the kernel ends the process at the n-th byte that it writes to a file, whoever writes it:
                by RLIMIT_FSIZE, whose SIGXFSZ is as sudden as SIGKILL and as exact as no signal from outside

Run as a script, this file is the server.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

SECONDS = 120
"""After which a run that hangs is ended."""


@dataclass(frozen=True)
class Line:
    """The n-th line, counted from 1; -1 kills at none and counts them."""

    n: int


@dataclass(frozen=True)
class Call:
    """The `nth` call of built-in `name` below function `inside`."""

    name: str
    inside: str
    nth: int = 1
    after: bool = False


@dataclass(frozen=True)
class Bytes:
    """`count` bytes into the `nth` time that `file` is written."""

    file: str
    count: int
    nth: int = 1


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Its exit code, or minus the signal that ended it."""
    output: str
    lines: int
    """Of the package, executed by the main thread where they were counted."""


class ForkedRuns:
    """The server, as its client sees it."""

    def __init__(self) -> None:
        import etpp_ssl

        root = str(Path(etpp_ssl.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        recipe: Path,
        *overrides: str,
        moment: Line | Call | Bytes | None = None,
        clock: bool = False,
    ) -> Ended:
        """Run a recipe, of whatever task, to its end or until the moment.

        Args:
            recipe: its file; the process's output goes beside it.
            overrides: as on the command line.
            moment: when to kill it.
            clock: let time pass with each crop, as long as its bandwidth is large, instead of by itself.
        """
        named = None if moment is None else [type(moment).__name__, asdict(moment)]
        return self._ordered(recipe=str(recipe), overrides=overrides, moment=named, clock=clock)[0]

    def run_together(
        self, recipe: Path, *overrides: str, num_processes: int, refused: Sequence[int] = ()
    ) -> list[Ended]:
        """Run a recipe by several processes.

        Args:
            recipe: its file.
            overrides: as on the command line.
            num_processes: how many.
            refused: steps whose checkpoints find the disk full.
        """
        return self._ordered(
            recipe=str(recipe), overrides=overrides, num_processes=num_processes, refused=refused
        )

    def _ordered(self, **order: Any) -> list[Ended]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return [Ended(**ended) for ended in json.loads(self._server.stdout.readline())]

    def close(self) -> None:
        """End the server."""
        self._server.communicate()


def keyed(key: str, end: int) -> int:
    """A number from 1 to `end` - 1."""
    return random.Random(key).randrange(1, end)


def serve() -> None:
    """Fork a process per order on stdin, and say on stdout how it ended."""
    import etpp_ssl.engine.finetune
    import etpp_ssl.engine.pretrain  # noqa: F401

    # What the imports have made is never collected, so that the processes go on sharing its memory.
    gc.collect()
    gc.freeze()
    for text in sys.stdin:
        order = json.loads(text)
        count = order.get("num_processes", 1)
        folder = Path(order["recipe"]).parent
        places = [folder / f"process-{rank}" for rank in range(count)]
        (folder / "meeting").unlink(missing_ok=True)
        pids = []
        for rank, place in enumerate(places):
            place.with_suffix(".lines").unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                os._exit(_child(order, rank, place))
            pids.append(pid)
        ended = [_ended(pid, place) for pid, place in zip(pids, places, strict=True)]
        print(json.dumps([asdict(one) for one in ended]), flush=True)


def _ended(pid: int, place: Path) -> Ended:
    _, status = os.waitpid(pid, 0)
    lines = place.with_suffix(".lines")
    return Ended(
        code=os.waitstatus_to_exitcode(status),
        output=place.with_suffix(".log").read_text(),
        lines=int(lines.read_text()) if lines.exists() else 0,
    )


def _child(order: dict[str, Any], rank: int, place: Path) -> int:
    with place.with_suffix(".log").open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(SECONDS)
    # A group of its own, which no signal to the tests reaches.
    os.setsid()
    try:
        if order.get("num_processes", 1) > 1:
            _meet(place.with_name("meeting"), rank, order["num_processes"])
        _run(order)
        place.with_suffix(".lines").write_text(str(_lines))
        return 0
    except BaseException as error:
        traceback.print_exc()
        return int(getattr(error, "exit_code", 70))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _meet(file: Path, rank: int, count: int) -> None:
    """What torchrun sets, and the processes' first contact through a file instead of a port."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count)


def _run(order: dict[str, Any]) -> None:
    from etpp_ssl.engine.finetune import finetune
    from etpp_ssl.engine.pretrain import pretrain
    from etpp_ssl.recipe import Recipe
    from etpp_ssl.recipe_file import load_any_recipe

    if order.get("clock"):
        _turn_the_clock()
    if order.get("refused"):
        _fill_the_disk(order["refused"])
    recipe = load_any_recipe(order["recipe"], order["overrides"])
    # Data workers are forked from here, and are not what is killed.
    os.register_at_fork(after_in_child=_unwatched)
    if order.get("moment") is not None:
        kind, values = order["moment"]
        {"Line": _kill_at_line, "Call": _kill_at_call, "Bytes": _kill_at_byte}[kind](**values)
    if isinstance(recipe, Recipe):
        pretrain(recipe)
    else:
        finetune(recipe)
    _unwatched()


_lines = 0


def _unwatched() -> None:
    sys.settrace(None)
    sys.setprofile(None)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_line(n: int) -> None:
    import etpp_ssl

    package = str(Path(etpp_ssl.__file__).parent)

    def line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        global _lines
        if event == "line":
            _lines += 1
            if _lines == n:
                _kill()
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return line if frame.f_code.co_filename.startswith(package) else None

    sys.settrace(call)


def _kill_at_call(name: str, inside: str, nth: int, after: bool) -> None:
    wanted, done = "c_return" if after else "c_call", 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal done
        if event == wanted and argument.__name__ == name and _is_inside(frame, inside):
            done += 1
            if done == nth:
                _kill()

    sys.setprofile(profile)


def _is_inside(frame: FrameType | None, function: str) -> bool:
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def _kill_at_byte(file: str, count: int, nth: int) -> None:
    if file.endswith(".safetensors"):
        _kill_in_tensors(file, count, nth)
        return
    done = 0

    def opened(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event != "open" or not str(arguments[0]).endswith(file):
            return
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            done += 1
            if done == nth:
                there = Path(arguments[0])
                appended = arguments[2] & os.O_APPEND and there.exists()
                end = count + (there.stat().st_size if appended else 0)
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (end, resource.RLIM_INFINITY))

    sys.addaudithook(opened)


def _kill_in_tensors(file: str, count: int, nth: int) -> None:
    """safetensors allocates a whole file, under another name, before it writes; older ones did not."""
    from safetensors.torch import save

    done = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal done
        if event != "call" or frame.f_code.co_name != "save_file":
            return
        path = Path(frame.f_locals["filename"])
        if path.name == file:
            done += 1
            if done == nth:
                path.write_bytes(save(frame.f_locals["tensors"])[:count])
                _kill()

    sys.setprofile(profile)


def _turn_the_clock() -> None:
    """Measured speeds, and the plans made of them, are the same for every process then."""
    from torch import Tensor

    import etpp_ssl.engine.budget as budget
    import etpp_ssl.engine.metrics as metrics
    import etpp_ssl.engine.pretrain as loop

    now = 0.0

    def slow(crop: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def slow_crop(images: Tensor, bandwidth: tuple[int, int]) -> Tensor:
            nonlocal now
            now += bandwidth[0] / 8
            return crop(images, bandwidth)

        return slow_crop

    for module in (budget, metrics):
        module.time = SimpleNamespace(perf_counter=lambda: now)
    for module in (budget, loop):
        module.low_frequency_crop = slow(module.low_frequency_crop)


def _fill_the_disk(refused: Sequence[int]) -> None:
    import etpp_ssl.engine.checkpoint as checkpoint

    real = checkpoint.take_place

    def take_place(aside: Path, folder: Path, old: Path) -> None:
        if int(folder.name.removeprefix("step-")) in refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(aside, folder, old)

    checkpoint.take_place = take_place


if __name__ == "__main__":
    serve()
    os._exit(0)
