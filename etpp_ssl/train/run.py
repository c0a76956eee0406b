"""A run: the components that a recipe is resolved into, once; see `etpp_ssl.train.launch`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum, Stage
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.replay import Replay, ReplayPlan
from etpp_ssl.data.sampler import RequestSampler
from etpp_ssl.data.training import TrainingImages
from etpp_ssl.dist.peers import Agreement, agree_on_start
from etpp_ssl.dist.sharding import Copies
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.run_state import TrainState, environment, environment_changes
from etpp_ssl.tasks.base import Task
from etpp_ssl.train.batches import TrainingBatches, follow_stream, place_in_stream
from etpp_ssl.train.checkpoint import load_checkpoint, load_tensors
from etpp_ssl.train.log import MetricsFile, Progress
from etpp_ssl.train.start import FolderLock


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
    average: ModelEmaV3 | None
    """The moving average of the weights, where the recipe wants one; see `weight_average`."""
    state: TrainState
    metrics: MetricsFile
    progress: Progress
    kernels: str
    """What a checkpoint remembers of the kernels chosen."""
    data_fingerprint: str
    classes: list[str] | None
    """Class names in the order of a classifier's outputs."""
    clock: Callable[[], float] = field(default=time.perf_counter, init=False)
    """Seconds since some moment: what speed and a budget in hours are measured by."""
    late_verdicts: bool | None = field(default=None, init=False)
    """Whether the host learns one step later that a step was not finite; None: as the device is best used."""
    batches: TrainingBatches | None = field(default=None, init=False)
    """Those opened last."""
    newest: dict[str, float | None] = field(default_factory=dict, init=False)
    """The newest row's loss, and the numbers of the newest evaluation."""

    collapses: set[str] = field(default_factory=set, init=False)
    """The kinds of signs of a collapse that were told."""

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
        """Of a step: the schedule's where the step begins, lowered by each rewind.

        The first step of a warm-up takes the rate in the middle of its share of compute: where it begins,
        the rate is 0, and a run of one step would learn nothing. A run that version 0.5 began keeps the 0.

        Args:
            stage: from `Curriculum.stage_at`.
        """
        progress = stage.progress
        if stage.step == 0 and self.state.first_step_learns and self.recipe.optim.warmup_share:
            progress = self.curriculum.progress_after(1) / 2
        return self.state.lr_factor * self.recipe.optim.learning_rates(stage.batch_size)(progress)

    def trained_model(self) -> nn.Module:
        """What is evaluated and exported: the moving average, where there is one; a copy if it is sharded.

        Batch norms' statistics are each process's own; here all processes get the main one's, which are
        those that a checkpoint holds. Every process must call it.
        """
        model = self.bare_model if self.average is None else self.average.module
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
        read = range(replay.first_read, steps.stop)
        builder, requests = self.source.loading(
            RequestSampler(None, step_plan, read, **part),
            self.task.view,
            self.task.num_classes,
            place_in_stream(state, rank, num_workers),
        )
        self.batches = TrainingBatches(
            builder,
            requests,
            accelerator,
            num_workers=num_workers,
            prefetch=recipe.data.prefetch,
            stall_seconds=recipe.data.stall_seconds,
            replay=replay,
            taken=follow_stream(state, accelerator, num_workers, recipe.micro_batch_size),
            clock=self.clock,
        )
        return self.batches

    def synchronised(self, batch: Batch) -> AbstractContextManager[None]:
        """Exchange gradients with the step's last micro-batch only."""
        if batch.request.last:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.model)
        return context

    def gradient_norm(self) -> Tensor:
        """Clip a step's gradients, where the recipe says so; their norm before that, over all shards, ()."""
        parameters = list(self.model.parameters())
        if self.recipe.optim.clip_grad is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.recipe.optim.clip_grad)
        else:
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def check_stream(self) -> None:
        """See that so many processes can read the training images, from where the run stands.

        Raises:
            UserError: if they cannot.
        """
        data, state = self.recipe.data, self.state
        num_processes, num_workers = self.accelerator.num_processes, max(1, data.num_workers)
        self.source.check_workers(num_processes * num_workers)
        if not self.source.is_stream:
            return
        for stage in self.curriculum.stages:
            if stage.buffer_steps:
                raise UserError(
                    f"curriculum: stage {stage.index + 1} has a replay buffer, which a resumed run refills "
                    f"by index, but data.name {data.name} is a stream: leave replay out, or use indexed data"
                )
        places = [place for place in state.streams if place is not None]
        if not places:
            return
        for what, before, now in (
            ("processes", len(state.streams), num_processes),
            ("data.num_workers", len(places[0]["lanes"]), num_workers),
            ("micro_batch_size", places[0]["micro_batch_size"], self.recipe.micro_batch_size),
        ):
            if before != now:
                raise UserError(
                    f"the run's stream was read with {what} {before} and cannot be resumed with {now}: "
                    f"use {before}, or --fork with another output, which begins the stream anew"
                )

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

    def load(self, checkpoint: Checkpoint) -> TrainState:
        """Bring back a checkpoint but for its progress, which is returned; a collective where it is sharded.

        Says what may change the last bits.

        Raises:
            UserError: if it belongs to another model.
        """
        saved = load_checkpoint(checkpoint, self.bare_model, self.optimizer)
        if self.average is not None:
            tensors = checkpoint.average() or {}
            load_tensors(self.average.module, tensors, f"moving average of {checkpoint.path}")
        if self.accelerator.scaler is not None and saved.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        changes = environment_changes(saved["environment"], self.environment)
        if changes:
            self.progress.say(f"warning: the last bits may differ from the run so far: {', '.join(changes)}")
        return TrainState.from_json(saved["state"])


def weight_average(model: nn.Module, decay: float, *, warmup: bool = False) -> ModelEmaV3:
    """A second model, `module`, whose weights follow a trained one's.

    With d the decay and w_k the weights after step k, the average after step n is
    d^(n-1) w_1 + (1-d) (d^(n-2) w_2 + ... + d w_(n-1) + w_n): the first step replaces the untrained
    weights. Parameters and floating-point buffers are averaged, in float32; integer buffers are copied.
    What `update(model, step)` does depends on the number of finished steps alone, so the average is exactly
    the `state_dict` of its `module`. BatchNorm's statistics are those of this process, which sees its part of
    each batch only.

    Args:
        model: the bare model on its device, neither compiled nor wrapped for several processes; of a
            sharded one a copy of the parts (`Copies.parts`), which then are averaged each on its process.
        decay: d, in (0, 1).
        warmup: take min(d, 1 - k^(-2/3)) at step k instead, so that a short run forgets its beginning.
    """
    average = ModelEmaV3(model, decay=decay, use_warmup=warmup, dtype=torch.float32)
    average.module.requires_grad_(False)
    return average
