"""A training run around its loop: signals, status, rewinds, and faults as sentences."""

from __future__ import annotations

from pathlib import Path

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.dist.accelerator import StopRequest, process_as_found
from etpp_ssl.dist.peers import finish_trackers, leave, leave_words, lost_peer, with_peers, words_of
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.loop import train
from etpp_ssl.train.memory import freed_memory_kept
from etpp_ssl.train.nonfinite import NonFinite, rewind
from etpp_ssl.train.open import open_run, prepare_run
from etpp_ssl.train.records import write_status
from etpp_ssl.train.run import Run
from etpp_ssl.train.summary import tell_end
from etpp_ssl.train.time_budget import decide_steps


@process_as_found()
def pretrain(recipe: Recipe, fork: Path | None = None) -> Run:
    """Pre-train to the end of the budget, from the run folder's newest checkpoint if there is one.

    Args:
        recipe: the run; a finished one is left as it is.
        fork: a run folder to start from instead; see `etpp_ssl.train.open.open_run`.

    Returns:
        The finished run.

    Raises:
        UserError: for a mistake in recipe, data, folder or checkpoint, or a budget in hours that is too
            short.
        RunFault: for a disk, a data worker, another process or a loss that failed on the way.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and its checkpoint is written.
    """
    run = open_run(recipe, fork)
    launch(run)
    return run


@process_as_found()
def finetune(recipe: FinetuneRecipe, fork: Path | None = None) -> Run:
    """Train a classifier to the end of the budget; see `pretrain`."""
    run = open_run(recipe, fork)
    launch(run)
    return run


def launch(run: Run) -> None:
    """Train a run to its end; a finished one is left as it is.

    Args:
        run: as it was opened.

    Raises:
        UserError, RunFault, Interrupted: see `pretrain`.
    """
    # To the very end: torchrun sends SIGTERM to those that are left when one process has failed, and they
    # still have to say so.
    with StopRequest() as stop_request:
        with with_peers():
            run.check_agreement()
        if run.finished:
            tell_end(run)
            leave(run.accelerator)
            return
        try:
            with freed_memory_kept(run.accelerator.device):
                decide_steps(run)
                prepare_run(run)
                write_status(run, "running")
                signum = _train_through(run, stop_request)
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
                run.progress.stop()
                tell_end(run)
            else:
                write_status(run, "stopped", exit_code=interrupted.exit_code, message=str(interrupted))
                run.progress.say(f"etpp: {interrupted}; the same command resumes")
        finally:
            run.progress.stop()
            run.lock.release()
            finish_trackers(run.accelerator)
        leave(run.accelerator)
    if interrupted is not None:
        raise interrupted


def _train_through(run: Run, stop_request: StopRequest) -> int:
    while True:
        try:
            return train(run, stop_request)
        except NonFinite as fault:
            if not fault.rewinds:
                raise
            rewind(run, fault)
        finally:
            if run.batches is not None:
                run.batches.close()
