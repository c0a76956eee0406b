"""A run: the components that a recipe is resolved into, once.

Everything is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.replay import Replay, ReplayPlan
from etpp_ssl.data.sampler import RequestSampler
from etpp_ssl.data.training import Reader, TrainingImages
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.agreement import Agreement, agree_on_start
from etpp_ssl.dist.fsdp import check_sharded, prepare, sharding_in_use
from etpp_ssl.dist.peers import with_peers
from etpp_ssl.dist.sharding import Copies
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.run_state import TrainState, environment, environment_changes
from etpp_ssl.tasks.base import Task
from etpp_ssl.tasks.classify import Classification, open_evaluation
from etpp_ssl.tasks.mae import MaskedAutoencoding, build_probe
from etpp_ssl.train.batches import TrainingBatches
from etpp_ssl.train.checkpoint import load_checkpoint
from etpp_ssl.train.ema import WeightAverage
from etpp_ssl.train.folder_lock import FolderLock
from etpp_ssl.train.memory import check_host_memory, check_replay, replay_notes
from etpp_ssl.train.metrics import MetricsFile
from etpp_ssl.train.progress import Progress
from etpp_ssl.train.start import prepare_folder, starting_point
from etpp_ssl.train.streams import check_stream, follow_stream, place_in_stream


@dataclass(kw_only=True)
class Run:
    """What a run of any task consists of, ready to train or already finished."""

    recipe: Recipe | FinetuneRecipe
    """What the run was resolved from, for its folder, its dumps and the other processes."""
    folder: RunFolder
    accelerator: Accelerator
    curriculum: Curriculum
    source: TrainingImages
    task: Task
    model: nn.Module
    """The task's model as accelerate prepared it."""
    copies: Copies | None
    """Makes whole copies of the model where it is sharded."""
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    """The moving average of the weights, where the recipe wants one."""
    state: TrainState
    metrics: MetricsFile
    progress: Progress
    kernels: str
    """What a checkpoint remembers of the kernels chosen."""
    data_fingerprint: str
    classes: list[str] | None
    """Class names in the order of a classifier's outputs."""
    batches: TrainingBatches | None = field(default=None, init=False)
    """Those opened last."""

    @cached_property
    def lock(self) -> FolderLock:
        """On the run folder, for the main process."""
        return FolderLock(self.folder.path)

    @cached_property
    def agreement(self) -> Agreement:
        """What the processes decide together; all of them must ask for it first at the same moment."""
        return Agreement(self.accelerator)

    @property
    def bare_model(self) -> nn.Module:
        """The task's model: neither wrapped for several processes nor for a precision."""
        return self.task.model

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.state.step >= self.curriculum.num_steps

    @property
    def environment(self) -> dict[str, str]:
        """What can change the last bits of the run."""
        return environment(self.accelerator.num_processes, self.accelerator.device, self.kernels)

    def learning_rate(self, stage: Stage) -> float:
        """Of a step: the schedule's, lowered by each rewind; `stage` is from `Curriculum.stage_at`."""
        schedule = self.recipe.optim.schedule(stage.batch_size)
        return self.state.lr_factor * schedule(stage.progress)

    def trained_model(self) -> nn.Module:
        """What is evaluated and exported: the moving average, where there is one; a copy if it is sharded.

        Batch norms' statistics are each process's own; here all processes get the main one's, which are
        those that a checkpoint holds. Every process must call it.
        """
        model = self.bare_model if self.average is None else self.average.model
        if self.copies is not None:
            model = self.copies.whole(model)
        for buffer in model.buffers():
            broadcast(buffer)
        return model

    def open_batches(self, step_plan: Callable[[int], ReplayPlan], steps: range) -> TrainingBatches:
        """This process's batches of the given steps; `step_plan` gives the stage of each."""
        recipe, state, accelerator = self.recipe, self.state, self.accelerator
        rank, num_workers = accelerator.process_index, recipe.data.num_workers
        part: dict[str, Any] = {
            "rank": rank,
            "num_processes": accelerator.num_processes,
            "micro_batch_size": recipe.micro_batch_size,
            "batch_size": recipe.batch_size,
        }
        replay = Replay(
            step_plan,
            steps.start,
            seed=recipe.seed,
            say=self.progress.say,
            pin_memory=accelerator.device.type == "cuda",
            **part,
        )
        reader = Reader(
            seed=recipe.seed,
            rank=rank,
            num_processes=accelerator.num_processes,
            view=self.task.view,
            num_classes=self.task.num_classes,
            place=place_in_stream(state, rank, num_workers),
        )
        read = range(replay.first_read, steps.stop)
        loading = self.source.loading(
            partial(RequestSampler, step_plan=step_plan, steps=read, **part), reader
        )
        self.batches = TrainingBatches(
            loading.builder,
            loading.requests,
            accelerator,
            num_workers=num_workers,
            prefetch=recipe.data.prefetch,
            stall_seconds=recipe.data.stall_seconds,
            replay=replay,
            taken=follow_stream(state, accelerator, num_workers, recipe.micro_batch_size),
        )
        return self.batches

    def synchronised(self, batch: Batch) -> AbstractContextManager[None]:
        """Exchange gradients with the step's last micro-batch only."""
        if batch.request.last:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.model)
        return context

    def check_agreement(self) -> None:
        """See that all processes have opened the same run; every process must call it.

        Raises:
            UserError: on all processes, if they have not.
        """
        agree_on_start(
            self.accelerator,
            self.recipe.model_dump(),
            {
                "step": self.state.step,
                "number of steps": self.curriculum.num_steps,
                "data": self.data_fingerprint,
            },
            is_stream=self.source.is_stream,
        )

    def restore(self, saved: dict[str, Any]) -> None:
        """Bring back what a checkpoint holds beside tensors and progress; say what may change the last bits.

        Args:
            saved: the content of its `state.json`.
        """
        if self.accelerator.scaler is not None and saved.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        changes = environment_changes(saved["environment"], self.environment)
        if changes:
            self.progress.say(f"warning: the last bits may differ from the run so far: {', '.join(changes)}")


@with_peers()
def open_run(recipe: Recipe | FinetuneRecipe, fork: Path | None = None) -> Run:
    """Open a recipe's run folder: a new run, or the newest checkpoint of the one that is there.

    Nothing is written; see `prepare_run`.

    Args:
        recipe: the run.
        fork: another run folder to start from: its newest checkpoint's weights, optimizer and step go
            into a new folder under this recipe, whose schedules hold from that step on.

    Raises:
        UserError: for anything wrong with recipe, data, folder or checkpoint.
    """
    accelerator = open_accelerator(recipe)
    source = recipe.open_training()
    curriculum = recipe.build_curriculum(len(source))
    progress = Progress(curriculum, visible=accelerator.is_main_process)
    recipe.check_curriculum(curriculum)
    task, classes = _open_task(recipe, source, accelerator)
    folder = RunFolder(recipe.output)
    start, state = starting_point(recipe, folder, source, curriculum, fork, progress.say)
    if recipe.init is not None and start is None:
        task.load_init(recipe.init, progress.say)
    if state.plan is not None:
        curriculum = progress.curriculum = curriculum.laid_out(state.plan.segments)
    check_start(recipe, source, curriculum, state, accelerator.num_processes)
    if accelerator.is_fsdp2:
        check_sharded(
            curriculum.stages,
            micro_batch_size=recipe.micro_batch_size,
            batch_size=recipe.batch_size,
            num_processes=accelerator.num_processes,
            compiled=isinstance(recipe, Recipe) and recipe.model.compiled,
        )
    optimizer = recipe.optim.build(task.net, accelerator.device)
    model, prepared_optimizer, copies = prepare(accelerator, task.model, optimizer)
    run = Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        curriculum=curriculum,
        source=source,
        task=task,
        model=model,
        copies=copies,
        optimizer=prepared_optimizer,
        average=_average(recipe, task.model if copies is None else copies.parts(task.model)),
        state=state,
        metrics=MetricsFile(folder, accelerator, progress.say),
        progress=progress,
        kernels=task.kernels + sharding_in_use(accelerator),
        data_fingerprint=source.fingerprint(),
        classes=classes,
    )
    if start is not None:
        saved = load_checkpoint(start, task.model, optimizer)
        if run.average is not None:
            run.average.load_state_dict(start.average() or {}, f"moving average of {start.path}")
        run.restore(saved)
    return run


def bare_task(
    recipe: Recipe | FinetuneRecipe,
    device: torch.device,
    num_classes: int | None,
    build: Callable[[Callable[[], nn.Module]], Any],
) -> MaskedAutoencoding | Classification:
    """A recipe's task with nothing to evaluate.

    Args:
        recipe: of any task.
        device: of the images.
        num_classes: of a classifier; None for a masked autoencoder.
        build: called with a function that builds the model; returns the model.
    """
    if isinstance(recipe, FinetuneRecipe):
        assert num_classes is not None
        return Classification.of(recipe, build(partial(recipe.build_model, num_classes)), device, num_classes)
    return MaskedAutoencoding.of(recipe, build(recipe.build_model), device)


def _open_task(
    recipe: Recipe | FinetuneRecipe, source: TrainingImages, accelerator: Accelerator
) -> tuple[Task, list[str] | None]:
    """A recipe's task with its evaluation, and the class names of a classifier."""
    num_classes = None
    if isinstance(recipe, FinetuneRecipe):
        num_classes = recipe.num_classes(source.classes)
        source.check_labels(num_classes)

    def build(model: Callable[[], nn.Module]) -> nn.Module:
        check_host_memory(
            recipe.model.name,
            model,
            image_shape=(recipe.in_chans, *recipe.size),
            batch_size=recipe.batch_size,
            micro_batch_size=recipe.micro_batch_size,
        )
        return freshly_initialised(recipe.seed, model)

    task = bare_task(recipe, accelerator.device, num_classes, build)
    if isinstance(recipe, Recipe):
        assert isinstance(task, MaskedAutoencoding)
        probe = build_probe(recipe, accelerator, task.normalise, task.objective)
        task.attach_probe(probe, getattr(recipe.probe, "every_steps", None))
        return task, None
    assert isinstance(task, Classification)
    images = open_evaluation(recipe, accelerator, task.normalise, source.classes, task.num_classes)
    task.attach_evaluation(images, recipe.evaluate.every_steps)
    # A stream may not tell class names; its evaluation images may.
    named = source.classes or (images.source.classes if images is not None else None)
    return task, named or [str(number) for number in range(task.num_classes)]


def _average(recipe: Recipe | FinetuneRecipe, model: nn.Module) -> WeightAverage | None:
    if isinstance(recipe, Recipe) or recipe.optim.ema is None:
        return None
    return WeightAverage(model, recipe.optim.ema, warmup=recipe.optim.ema_warmup)


def check_start(
    recipe: Recipe | FinetuneRecipe,
    source: TrainingImages,
    curriculum: Curriculum,
    state: TrainState,
    num_processes: int,
) -> None:
    """See that a run can start from its state with so many processes.

    Raises:
        UserError: if it cannot.
    """
    for stage in curriculum.stages:
        if stage.batch_size < num_processes:
            raise UserError(
                f"batch_size {stage.batch_size} (stage {stage.index + 1}) is smaller than the "
                f"{num_processes} processes; each needs at least one image per step"
            )
    if state.step > curriculum.num_steps:
        raise UserError(
            f"checkpoint of step {state.step} is beyond this recipe's {curriculum.num_steps} steps"
        )
    check_replay(recipe.crop_view(), recipe.in_chans, curriculum, num_processes, state.step)
    check_stream(
        source,
        curriculum,
        state,
        num_processes=num_processes,
        num_workers=recipe.data.num_workers,
        micro_batch_size=recipe.micro_batch_size,
        name=recipe.data.name,
    )


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
        num_parameters = sum(parameter.numel() for parameter in run.bare_model.parameters())
        try:
            prepare_folder(run.folder, run.recipe, run.state, num_parameters, run.metrics, run.lock)
        except UserError as error:
            fault = str(error)
    fault = run.agreement.main_says(fault)
    if fault:
        raise UserError(fault)
    recipe, stages = run.recipe, run.curriculum.stages
    for note in (
        *replay_notes(recipe.crop_view(), recipe.in_chans, stages),
        *run.task.start_notes(stages, recipe.precision),
    ):
        run.progress.say(note)
    if recipe.tracker.name != "none":
        run.accelerator.init_trackers(recipe.tracker.project)
