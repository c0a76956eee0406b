"""A training run around its loop: signals, status, rewinds, and faults as sentences."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.data.cache import keep, keeping
from etpp_ssl.data.training import IndexedImages
from etpp_ssl.dist.accelerator import StopRequest, process_as_found
from etpp_ssl.dist.peers import finish_trackers, leave, leave_words, lost_peer, with_peers, words_of
from etpp_ssl.files import flush
from etpp_ssl.model.encoders import unused_weights
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.checkpoint import clear_leftovers
from etpp_ssl.train.loop import train
from etpp_ssl.train.memory import freed_memory_kept, replay_notes
from etpp_ssl.train.nonfinite import NonFinite, rewind
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.records import write_status
from etpp_ssl.train.run import Run
from etpp_ssl.train.selection import settled
from etpp_ssl.train.start import check_room, write_plan
from etpp_ssl.train.summary import counted, tell_end, tell_start
from etpp_ssl.train.time_budget import Speed, decide_steps, measure


@process_as_found()
def pretrain(recipe: Recipe, fork: Path | None = None) -> Run:
    """Pre-train to the end of the budget, from the run folder's newest checkpoint if there is one.

    Args:
        recipe: the run; a finished one is left as it is.
        fork: a run folder to start from instead; see `etpp_ssl.train.opening.open_run`.

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
    """Train a classifier to the end of the budget; see `pretrain`.

    With `optim.base_lr=auto`, short runs come first; see `etpp_ssl.train.selection.settled`.
    """

    def say(text: str) -> None:
        # Before a run is opened nobody else speaks for the main process.
        if os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr, flush=True)

    run = open_run(settled(recipe, _run_trial, say), fork)
    launch(run)
    return run


def _run_trial(recipe: FinetuneRecipe, features: Path) -> Run:
    run = open_run(recipe, features=features, shown=False)
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


def prepare_run(run: Run) -> None:
    """Create the folder of a run that is about to train, or bring it back to where the run stands.

    Raises:
        UserError: on all processes, if the disk is too full, the folder cannot be written to, or another
            process trains in it.
    """
    # The other processes may still be reading what the main one is about to change.
    run.accelerator.wait_for_everyone()
    fault = ""
    if run.accelerator.is_main_process:
        try:
            prepare_folder(run)
        except UserError as error:
            fault = str(error)
        except OSError as error:
            fault = f"output {str(run.folder.path)!r} cannot be written to: {error.strerror or error}"
    fault = run.agreement.main_says(fault)
    if fault:
        raise UserError(fault)
    tell_start(run)
    recipe, stages = run.recipe, run.curriculum.stages
    for note in (
        *recipe.notes,
        *(unused_weights(recipe.model.name, recipe.init) if run.state.step == 0 else ()),
        *replay_notes(recipe.crop_view(), recipe.in_chans, stages),
    ):
        run.progress.say(note)
    if recipe.tracker.name != "none":
        run.accelerator.init_trackers(recipe.tracker.project)
    if isinstance(run.source, IndexedImages) and recipe.data.cache != "off" and not run.finished:
        run.source.opened = keep(
            run.source.source,
            keeping(recipe.crop_view(), [stage.bandwidth for stage in stages]),
            recipe.data.cache,
            num_threads=recipe.data.num_workers,
            say=run.progress.say,
        )


def prepare_folder(run: Run) -> None:
    """The main process's part of `prepare_run`.

    Raises:
        OSError: if the folder cannot be written to.
        UserError: for what else keeps the run from it.
    """
    folder, state = run.folder, run.state
    run.lock.acquire()
    clear_leftovers(folder, state.step)
    weights = sum(4 * parameter.numel() for parameter in run.bare_model.parameters())
    state_bytes = run.recipe.optim.cost(run.task.net).state_bytes
    check_room(folder, run.recipe.checkpoint.keep, weights + state_bytes)
    # First, since it makes a folder a run.
    run.recipe.save(folder.recipe_file)
    run.lock.acquire()
    folder.checkpoint_folder.mkdir(exist_ok=True)
    run.metrics.cut_back(state.step)
    write_plan(folder, state.plan)
    flush(folder.path)


@process_as_found()
@with_peers()
def measured_speed(recipe: Recipe | FinetuneRecipe) -> Speed:
    """How fast a recipe's run is here. It is opened anew, and leaves nothing; every process must call it.

    Raises:
        UserError: for anything that keeps the run from starting.
    """
    with tempfile.TemporaryDirectory() as nowhere:
        run = open_run(_without_choices(recipe).model_copy(update={"output": nowhere}))
        evaluation = f" and one {run.task.evaluation.how}" if run.task.evaluation is not None else ""
        run.progress.say(f"measuring {counted(len(run.curriculum.stages), 'stage')}{evaluation} ...")
        with freed_memory_kept(run.accelerator.device):
            speed = measure(run)
        leave(run.accelerator)
    return speed


def _without_choices(recipe: Recipe | FinetuneRecipe) -> Recipe | FinetuneRecipe:
    """A recipe whose run starts at once, and is as fast."""
    if isinstance(recipe, Recipe):
        return recipe
    evaluate = recipe.evaluate.model_copy(update={"keep_better": False})
    model = recipe.model.model_copy(update={"head": "random"})
    return recipe.model_copy(update={"evaluate": evaluate, "model": model})
