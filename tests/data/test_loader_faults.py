"""Workers that die, loaders that stall, memory that is full: one sentence with the images, and no hang."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from loader_scenes import Trapped, run_aside
from torch.utils.data import Dataset

from etpp_ssl.config import RunFault, UserError
from etpp_ssl.data import workers as worker
from etpp_ssl.data.formats.base import one_line_reasons
from etpp_ssl.data.loader import Batch, BatchBuilder, evaluation_requests, load_batches
from etpp_ssl.data.sampler import BatchRequest, KeyedOrder
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import EvalView
from etpp_ssl.data.workers import LoaderFault, death, machine_fault, stall

# More workers than cores are wanted here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.skipif(sys.platform != "linux", reason="ends and watches processes by Linux's means"),
]

SIZE = (16, 24)
NUM_IMAGES = 40
TRAP = 14
"""With four images a batch and two workers it is the third image of batch 3, the second one's second."""
GO_ON = "; the same command resumes from its last checkpoint, if it writes any"


def requests(first: int = 0) -> list[BatchRequest]:
    """Ten steps of four images, in order."""
    return [
        BatchRequest(step, images, images, SIZE, progress=step / 10, weight=1.0, last=True)
        for step in range(first, 10)
        for images in [tuple(range(4 * step, 4 * step + 4))]
    ]


def builder_of(act: Callable[[], Any], index: int = TRAP) -> BatchBuilder:
    inner = SyntheticConfig(num_images=NUM_IMAGES).open("train", in_chans=3, image_size=SIZE, seed=0)
    return BatchBuilder(Trapped(inner, index, act), EvalView(SIZE, 1.0), KeyedOrder(NUM_IMAGES, 0))


@dataclass(frozen=True)
class Laden(Dataset[Batch]):
    """Batches that bring something along when a worker hands them over."""

    builder: BatchBuilder
    load: Callable[[BatchRequest], Any]

    def __getitem__(self, request: BatchRequest) -> Batch:
        return replace(self.builder[request], cursor={"load": self.load(request)})


def opened(
    act: Callable[[], Any],
    num_workers: int = 2,
    *,
    index: int = TRAP,
    stall_seconds: float | None = None,
    asked: list[BatchRequest] | Iterator[BatchRequest] | None = None,
    load: Callable[[BatchRequest], Any] | None = None,
) -> Generator[Batch, None, None]:
    """Batches of a data set in which something happens at one image."""
    builder = builder_of(act, index)
    return load_batches(
        builder if load is None else Laden(builder, load),
        requests() if asked is None else asked,
        num_workers=num_workers,
        prefetch=2,
        pin_memory=False,
        stall_seconds=stall_seconds,
    )


def exit_after(signal_file: Path, code: int) -> None:
    """End the process a moment after a file has come to be there."""
    while not signal_file.exists():
        time.sleep(0.01)
    time.sleep(0.3)
    os._exit(code)


def nothing() -> None:
    """Does no harm."""


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long() -> None:
    time.sleep(1000)


def told(run: Callable[[], object]) -> str:
    """The sentence of the fault that `run` ends with, in a process of its own, which leaves nobody behind."""

    def body() -> None:
        try:
            run()
        except RunFault as fault:
            print(fault, file=sys.stderr)
            # The thread that has waited for a child may not have noted it yet.
            end = time.monotonic() + 5
            while multiprocessing.active_children() and time.monotonic() < end:
                time.sleep(0.05)
            print(f"children {len(multiprocessing.active_children())}", file=sys.stderr)
            sys.exit(fault.exit_code)

    ended = run_aside(body)
    assert ended.code == 1, ended.stderr
    assert ended.left_over == []
    assert "Traceback" not in ended.stderr
    *_, sentence, children = ended.stderr.strip().splitlines()
    assert children == "children 0"
    return sentence


IN_HAND = (
    r"step 3, samples 12, 13, 14, 15 "
    r"\('photos/12\.jpg', 'photos/13\.jpg', 'photos/14\.jpg', 'photos/15\.jpg'\)"
)


@pytest.mark.parametrize(
    ("act", "fate"),
    [
        (kill_self, r"was killed by SIGKILL, probably out of memory \(lower .*data\.num_workers.*\),"),
        (lambda: os._exit(3), "ended with exit code 3"),
        (lambda: ctypes.string_at(0), "was killed by SIGSEGV"),
        (os.abort, "was killed by SIGABRT"),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            r"was killed by SIGBUS, probably because shared memory \(/dev/shm, .* free\) is full "
            r"\(lower data\.num_workers or data\.prefetch, .*--shm-size=8g\)\),",
        ),
    ],
    ids=["SIGKILL", "exit 3", "SIGSEGV", "SIGABRT", "SIGBUS"],
)
def test_a_worker_that_dies_is_named_with_the_image_it_was_reading(act: Callable[[], Any], fate: str) -> None:
    sentence = told(lambda: list(opened(act)))
    assert re.fullmatch(
        rf"data: worker process 2 of 2 {fate} when it was reading image 'photos/14\.jpg' \(sample 14\), "
        rf"at work on {IN_HAND}(, while step \d was waited for)?{GO_ON}",
        sentence,
    )


def test_a_worker_that_died_while_a_batch_was_in_use_is_noticed_at_once(tmp_path: Path) -> None:
    with closing(opened(lambda: exit_after(tmp_path / "now", 0), num_workers=1, index=6)) as loader:
        assert next(loader).request.step == 0
        (tmp_path / "now").touch()
        for child in multiprocessing.active_children():
            child.join(30)
        with pytest.raises(LoaderFault) as error:
            list(loader)
    said = str(error.value)
    assert said.startswith("data: worker process 1 of 1 ended with exit code 0 when it was reading image ")
    assert "'photos/06.jpg' (sample 6), at work on step 1" in said


def test_a_death_is_told_where_a_batch_is_waited_for_and_nowhere_else() -> None:
    with closing(opened(nothing)) as training:
        assert next(training).request.step == 0
        for child in multiprocessing.active_children():
            child.kill()
        for child in multiprocessing.active_children():
            child.join(10)
        time.sleep(0.1)
        # An evaluation in this process: in its decoder any error would make an image unreadable.
        evaluated = list(opened(nothing, num_workers=0))
        assert len(evaluated) == 10
        assert not any(batch.bad for batch in evaluated)
        # And one with workers of its own.
        assert len(list(opened(nothing))) == 10
        with pytest.raises(LoaderFault, match=r"worker process 1 of 2 was killed by SIGKILL.* step"):
            list(training)


class HungUp:
    """What finds, when it is taken out of a message, that the sender has hung up."""

    def __init__(self, signal_file: Path) -> None:
        self.signal_file = signal_file

    def __reduce__(self) -> Any:
        return hung_up, (self.signal_file,)


def hung_up(signal_file: Path) -> None:
    signal_file.touch()
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def test_a_worker_that_hangs_up_before_it_dies_is_named(tmp_path: Path) -> None:
    def load(request: BatchRequest) -> HungUp | None:
        return HungUp(tmp_path / "now") if request.step == 1 else None

    # The one worker is at step 2 when its batch of step 1 is taken out.
    with closing(opened(lambda: exit_after(tmp_path / "now", 5), 1, index=9, load=load)) as loader:
        assert next(loader).request.step == 0
        with pytest.raises(LoaderFault, match="worker process 1 of 1 ended with exit code 5"):
            next(loader)


def kill_self_while_sending() -> None:
    """Wait until a pipe of this process is full, for somebody still writes to it, and die."""
    while True:
        for name in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                pipe = os.readlink(f"/proc/self/fd/{name}").startswith("pipe:")
                writes = pipe and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
                if writes and not select.select([], [int(name)], [], 0)[1]:
                    kill_self()


def test_a_worker_that_dies_in_the_middle_of_a_message_is_named() -> None:
    sentence = told(
        # Each batch is more than a pipe takes at once.
        lambda: list(opened(kill_self_while_sending, 1, index=4, load=lambda request: bytes(1 << 26)))
    )
    assert sentence.startswith("data: worker process 1 of 1 was killed by SIGKILL")
    assert "reading image 'photos/04.jpg' (sample 4), at work on step 1, samples 4, 5, 6, 7" in sentence


def test_a_worker_that_dies_when_its_images_are_read_is_named_with_its_batch() -> None:
    def load(request: BatchRequest) -> None:
        if request.step == 3:
            kill_self()

    sentence = told(lambda: list(opened(nothing, load=load)))
    assert re.fullmatch(
        rf"data: worker process 2 of 2 was killed by SIGKILL, [^,]+, at work on {IN_HAND}"
        rf"(, while step \d was waited for)?{GO_ON}",
        sentence,
    )


def test_the_loader_whose_worker_dies_is_the_one_that_says_so() -> None:
    training, evaluation = opened(nothing), opened(kill_self)
    with closing(training), closing(evaluation):
        next(training)
        with pytest.raises(LoaderFault, match="worker process 2 of 2 was killed by SIGKILL"):
            list(evaluation)
        assert [batch.request.step for batch in training] == list(range(1, 10))


def test_a_worker_that_dies_while_the_loader_is_opened_is_named() -> None:
    def slow() -> Iterator[BatchRequest]:
        for request in requests():
            yield request
            time.sleep(0.5)

    # The first image kills while further requests are still being given out.
    sentence = told(lambda: list(opened(kill_self, index=0, asked=slow())))
    assert sentence.startswith("data: worker process 1 of 2 was killed by SIGKILL")
    assert "reading image 'photos/00.jpg' (sample 0), at work on step 0, samples 0, 1, 2, 3" in sentence


def test_no_file_stays_open() -> None:
    def open_files() -> int:
        # torch's loader looks for dead workers every five seconds. Only then can the garbage collector, which
        # shall not come by chance here, have the last of it.
        deadline = time.monotonic() + 30
        while threading.active_count() > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def body() -> None:
        list(opened(nothing))
        before = open_files()
        with pytest.raises(LoaderFault):
            list(opened(kill_self))
        assert open_files() == before

    ended = run_aside(body)
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_stalls_is_named_with_the_image(num_workers: int) -> None:
    # The start of the workers counts.
    limit = 3.0 if num_workers else 0.5
    sentence = told(lambda: list(opened(sleep_long, num_workers, stall_seconds=limit)))
    who = "worker process 2 of 2" if num_workers else "the process"
    assert re.fullmatch(
        rf"data: no batch within data\.stall_seconds {limit:g} for {IN_HAND}: {who} is reading image "
        rf"'photos/14\.jpg' \(sample 14\){GO_ON}",
        sentence,
    )


def test_a_read_that_blocks_in_a_decoder_is_no_unreadable_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def read() -> None:
        with one_line_reasons():
            (tmp_path / "pipe").read_bytes()

    sentence = told(lambda: list(opened(read, 0, stall_seconds=0.5)))
    assert "is reading image 'photos/14.jpg' (sample 14)" in sentence


def deaf() -> None:
    """Ignore signals, and never let another thread run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL})
    ctypes.PyDLL(None).pause()


def test_workers_that_ignore_signals_are_ended_all_the_same() -> None:
    sentence = told(lambda: list(opened(deaf, stall_seconds=3.0)))
    assert "worker process 2 of 2 is reading image 'photos/14.jpg'" in sentence


def test_a_worker_that_hangs_before_its_last_batch_was_taken_over_is_named(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"

    def act() -> None:
        hangs.touch()
        deaf()

    def body() -> None:
        with closing(opened(act, num_workers=1, index=9, stall_seconds=3.0)) as loader:
            assert next(loader).request.step == 0
            # The next one is in the queue, but its files are still the worker's, who is at step 2 by then.
            while not hangs.exists():
                time.sleep(0.01)
            list(loader)

    sentence = told(body)
    assert sentence.startswith("data: no batch within data.stall_seconds 3 for step 1, samples 4, 5, 6, 7: ")
    assert "1 of 1 is reading image 'photos/09.jpg' (sample 9), at work on step 2, samples 8, 9" in sentence


@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_a_read_that_nothing_interrupts_ends_with_the_sentence(where: str) -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(1000)
            except BaseException:
                continue

    def body() -> None:
        faults: list[BaseException] = []

        def run() -> None:
            try:
                list(opened(stubborn, 0, stall_seconds=0.5))
            except LoaderFault as fault:
                faults.append(fault)

        thread = threading.Thread(target=run)
        thread.run() if where == "main thread" else thread.start()
        if where == "another thread":
            thread.join()
        raise faults[0]

    sentence = told(body)
    assert sentence.startswith("data: no batch within data.stall_seconds 0.5 for step 3, ")
    assert "is reading image 'photos/14.jpg' (sample 14)" in sentence


def test_a_decoder_in_an_endless_loop_is_ended_with_the_loader() -> None:
    def endless() -> None:
        while True:
            torch.ones(200, 200).exp()

    def body() -> None:
        try:
            list(opened(endless, 0, stall_seconds=0.5))
        finally:
            assert threading.active_count() == 1

    assert "the process is reading image 'photos/14.jpg' (sample 14)" in told(body)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_armed_between_two_batches(num_workers: int) -> None:
    with closing(opened(nothing, num_workers, stall_seconds=60.0)) as waiting:
        for _ in waiting:
            assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL
            assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL


def test_only_waiting_counts() -> None:
    def body() -> None:
        for batch in opened(nothing, stall_seconds=3.0):
            if batch.request.step == 4:
                time.sleep(3.5)

    ended = run_aside(body)
    assert (ended.code, ended.stderr) == (0, "")


def test_time_in_which_the_process_is_suspended_does_not_count(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def act() -> None:
        started.touch()
        time.sleep(0.7)

    def suspend(pid: int) -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)

    ended = run_aside(lambda: list(opened(act, 0, stall_seconds=1.0)), during=suspend)
    assert (ended.code, ended.stderr) == (0, "")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_the_data_set_itself_keeps_its_traceback_and_names_the_image(num_workers: int) -> None:
    def act() -> None:
        raise KeyError("caption")

    with pytest.raises(KeyError) as error:
        list(opened(act, num_workers))
    text = str(error.value) + "".join(getattr(error.value, "__notes__", ()))
    assert "etpp: it was raised for image 'photos/14.jpg' (sample 14 of step 3)" in text
    if num_workers:
        assert "Traceback" in text
        assert "raise KeyError" in text
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", [UserError, RunFault])
def test_a_sentence_of_the_data_stays_one_and_of_its_kind(kind: type[UserError], num_workers: int) -> None:
    def act() -> None:
        raise kind("shard 7 has gone")

    with pytest.raises(UserError) as error:
        list(opened(act, num_workers))
    assert type(error.value) is kind
    assert str(error.value) == "data: shard 7 has gone"


@pytest.mark.parametrize(("size", "when"), [("16k", ""), ("112k", r", while step \d was waited for")])
def test_full_shared_memory_is_recognised(size: str, when: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespaces = 0x10000000 | 0x00020000  # CLONE_NEWUSER | CLONE_NEWNS

    def body() -> None:
        user, group = os.getuid(), os.getgid()
        if libc.unshare(new_namespaces):
            sys.exit(77)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, f"size={size}".encode()):
            sys.exit(77)
        try:
            # The ten batches, of at least four pages each, are all kept.
            kept = list(opened(nothing))
        except LoaderFault as fault:
            print(fault, file=sys.stderr)
            sys.exit(1)
        assert kept

    ended = run_aside(body)
    if ended.code == 77:
        pytest.skip("mounting needs user namespaces")
    assert ended.code == 1, ended.stderr
    assert re.fullmatch(
        r"data: shared memory \(/dev/shm, 0 MB, 0 MB free\) has no room for what the workers hand over"
        rf"{when}: lower data\.num_workers or data\.prefetch, or give a container more "
        rf"\(docker run --shm-size=8g\){GO_ON}\n",
        ended.stderr,
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("unable to open shared memory object </torch_1> in read-write mode"), "has no room"),
        (
            RuntimeError("unable to mmap 128 bytes from file </torch_1>: Cannot allocate memory"),
            "has no room",
        ),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible"), "ulimit"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "4 worker processes cannot be started"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "lower data.num_workers"),
        (RuntimeError("Pin memory thread exited unexpectedly"), "pins batches for the GPU"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(errno.EIO, os.strerror(errno.EIO)), None),
        (KeyError("shared memory"), None),
    ],
)
def test_what_the_machine_lacks_is_told_apart_from_errors_of_the_data(
    error: Exception, words: str | None
) -> None:
    fault = machine_fault(error, requests()[5], num_workers=4)
    if words is None:
        assert fault is None
        return
    assert words in str(fault)
    assert "\n" not in str(fault)
    assert str(fault).endswith(GO_ON)
    assert fault.exit_code == 1


def test_a_fault_of_which_little_is_known_is_still_a_sentence() -> None:
    who, request = "worker process 2 of 4", requests()[5]
    assert str(death(who, 1, "", None)) == (
        f"data: worker process 2 of 4 ended with exit code 1 when it was not reading an image{GO_ON}"
    )
    note = "reading image '7.png' (sample 21)\n" + request.described("{}.png".format)
    text = str(death(who, -64, note, request))
    assert "was killed by SIGRTMAX when it was reading image '7.png' (sample 21), at work on step 5, " in text
    assert text.endswith(f"('20.png', '21.png', '22.png', '23.png'){GO_ON}")
    assert f"'23.png'), while step 4 was waited for{GO_ON}" in str(death(who, 1, note, requests()[4]))
    assert "signal 99" in str(death(who, -99, note, request))
    read = "\n" + request.described()
    assert str(death(who, 1, read, None)).endswith(f"code 1 at work on {request.described()}{GO_ON}")
    no_batch = "data: no batch within data.stall_seconds 5 for"
    assert str(stall("the process", 5.0, "", request)) == (
        f"{no_batch} step 5, samples 20, 21, 22, 23: the process is not reading an image{GO_ON}"
    )
    assert f"{no_batch} the first batch: {who} is not reading" in str(stall(who, 5.0, "", None))
    assert f"{no_batch} step 5, samples 20, 21, 22, 23 ('20.png', " in str(stall(who, 5.0, note, request))
    other = str(stall(who, 5.0, note, requests()[4]))
    assert f"{no_batch} step 4, samples 16, 17, 18, 19: {who} is reading image '7.png' (sample 21), " in other
    assert other.endswith(f"at work on {request.described('{}.png'.format)}{GO_ON}")


def test_a_request_is_described_by_its_place_and_its_first_images() -> None:
    def broken(index: int) -> str:
        raise IndexError(index)

    evaluation = evaluation_requests(range(9), size=SIZE, batch_size=9)[0]
    assert evaluation.described("{}.png".format) == (
        "evaluation batch 0, samples 0, 1, 2, 3, 4, and 4 more "
        "('0.png', '1.png', '2.png', '3.png', '4.png', and 4 more)"
    )
    assert "'image 20', 'image 21'" in requests()[5].described(broken)
    assert "('\\n\\udcff'" in requests()[5].described(lambda index: os.fsdecode(b"\n\xff"))
    assert len(requests()[5].described(lambda index: "long" * 1000)) < 2000


def test_a_note_outlives_the_process_that_wrote_it() -> None:
    memory = multiprocessing.get_context("fork").RawArray("c", worker.NOTE_BYTES)

    def write() -> None:
        worker.use_note(memory)
        worker.note_reading(5, "K\u00f6ln \udcff.png", "step 1")

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    writer.join(30)
    assert memory.value.decode() == "reading image 'K\u00f6ln \\udcff.png' (sample 5)\nstep 1"
    try:
        worker.use_note(memory)
        worker.note(100_000 * "\u00f6")
        assert len(memory.value) == worker.NOTE_BYTES - 1
        worker.note("")
        assert memory.value == b""
    finally:
        worker.use_note(None)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_signals_are_left_to_whoever_has_taken_them(num_workers: int) -> None:
    rung: list[int] = []

    def ring(signum: int, frame: FrameType | None) -> None:
        rung.append(signum)

    def body() -> None:
        theirs = {signal.SIGALRM, signal.SIGURG, signal.SIGCHLD}
        for signum in theirs:
            signal.signal(signum, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        # The alarm rings during a wait, which it does not end.
        with closing(opened(partial(time.sleep, 1.0), num_workers, stall_seconds=60.0)) as loader:
            assert len(list(loader)) == 10
        assert signal.SIGALRM in rung
        assert all(signal.getsignal(signum) is ring for signum in theirs)

    ended = run_aside(body)
    assert ended.code == 0, ended.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loaders_threads_end_with_it(num_workers: int) -> None:
    before = set(threading.enumerate())
    with closing(opened(nothing, num_workers, stall_seconds=60.0)) as loader:
        next(loader)
        next(loader)
        assert set(threading.enumerate()) - before
    # Those of multiprocessing's queues end when they come to it.
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
    assert set(threading.enumerate()) <= before


def test_a_loader_that_has_failed_is_left_alone_if_torchs_threads_hang() -> None:
    def body() -> None:
        from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

        _MultiProcessingDataLoaderIter._shutdown_workers = (  # type: ignore[method-assign]
            lambda self: threading.Event().wait(1000)
        )
        list(opened(kill_self))

    told(body)
