"""A training run around its loop: signals, status, rewinds, and faults as sentences."""

from __future__ import annotations

from collections.abc import Callable

from etpp_ssl.config import UserError
from etpp_ssl.dist.peers import leave, leave_words, lost_peer, with_peers, words_of
from etpp_ssl.dist.same_start import agree_on_start
from etpp_ssl.dist.signals import Interrupted, StopRequest
from etpp_ssl.train.base_run import BaseRun
from etpp_ssl.train.nonfinite import NonFinite, rewind
from etpp_ssl.train.status import write_status


def conduct(run: BaseRun, prepare: Callable[[], None], train: Callable[[StopRequest], int]) -> None:
    """Train a run to its end; a finished one is left as it is.

    Args:
        run: as it was opened.
        prepare: makes the run folder ready.
        train: the loop: from the run's step to its end, or until a signal arrives; returns the signal, or 0.

    Raises:
        UserError: for a mistake in data or folder.
        RunFault: for what failed on the way.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and its checkpoint is written.
    """
    # To the very end: torchrun sends SIGTERM to those that are left when one process has failed, and they
    # still have to say so.
    with StopRequest() as stop_request:
        with with_peers():
            agree_on_start(run)
        if run.finished:
            run.progress.say(f"run {run.folder.path} is finished ({run.state.step} steps)")
            leave(run.accelerator)
            return
        try:
            prepare()
            write_status(run, "running")
            signum = _train_through(run, train, stop_request)
        except Exception as error:
            told = error if isinstance(error, UserError) else lost_peer(error) or error
            leave_words(told)
            exit_code = told.exit_code if isinstance(told, UserError) else 1
            write_status(run, "failed", exit_code=exit_code, message=words_of(told))
            if told is error:
                raise
            raise told from error
        else:
            interrupted = None if run.finished else Interrupted(signum, run.state.step)
            if interrupted is None:
                write_status(run, "finished", exit_code=0)
            else:
                write_status(run, "stopped", exit_code=interrupted.exit_code, message=str(interrupted))
                run.progress.say(f"etpp: {interrupted}; the same command goes on from there")
        finally:
            run.progress.stop()
            run.lock.release()
        leave(run.accelerator)
    if interrupted is not None:
        raise interrupted


def _train_through(run: BaseRun, train: Callable[[StopRequest], int], stop_request: StopRequest) -> int:
    while True:
        try:
            return train(stop_request)
        except NonFinite as fault:
            if not fault.rewinds:
                raise
            rewind(run, fault)
        finally:
            if run.feed is not None:
                run.feed.close()
