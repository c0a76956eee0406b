"""What a run of any task consists of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.replay import Replay, ReplayPlan
from etpp_ssl.data.sampler import RequestSampler
from etpp_ssl.data.training import Reader, TrainingImages
from etpp_ssl.data.views import Normalise, View
from etpp_ssl.dist.agreement import Agreement
from etpp_ssl.dist.sharding import Copies
from etpp_ssl.recipe import RunRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.ema import WeightAverage
from etpp_ssl.train.feed import Feed
from etpp_ssl.train.folder_lock import FolderLock
from etpp_ssl.train.metrics import MetricsFile
from etpp_ssl.train.progress import Progress
from etpp_ssl.train.state import TrainState
from etpp_ssl.train.streams import follow_stream, place_in_stream


@dataclass(kw_only=True)
class BaseRun:
    """What a run of any task consists of, ready to train or already finished."""

    recipe: RunRecipe
    folder: RunFolder
    accelerator: Accelerator
    curriculum: Curriculum
    source: TrainingImages
    view: View
    normalise: Normalise
    model: torch.nn.Module
    """The model as accelerate prepared it."""
    bare_model: torch.nn.Module
    copies: Copies | None = None
    """Makes whole copies of the model where it is sharded."""
    optimizer: torch.optim.Optimizer
    state: TrainState
    metrics: MetricsFile
    progress: Progress
    kernels: str
    """What a checkpoint remembers of the kernels chosen."""
    data_fingerprint: str
    average: WeightAverage | None = None
    """The moving average of a classifier's weights, where the recipe wants one."""
    feed: Feed | None = None
    """The one opened last."""
    classes: list[str] | None = None
    """Class names in the order of a classifier's outputs."""
    num_classes: int | None = None
    """Of a classifier."""

    @cached_property
    def lock(self) -> FolderLock:
        """On the run folder, for the main process."""
        return FolderLock(self.folder.path)

    @cached_property
    def agreement(self) -> Agreement:
        """What the processes decide together; all of them must ask for it first at the same moment."""
        return Agreement(self.accelerator)

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return self.state.step >= self.curriculum.num_steps

    def open_feed(self, step_plan: Callable[[int], ReplayPlan], steps: range) -> Feed:
        """This process's batches of the given steps."""
        recipe, state, accelerator = self.recipe, self.state, self.accelerator
        part: dict[str, Any] = {
            "rank": accelerator.process_index,
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
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            view=self.view,
            num_classes=self.num_classes,
            place=place_in_stream(recipe, state, accelerator.process_index),
        )
        read = range(replay.first_read, steps.stop)
        loading = self.source.loading(
            partial(RequestSampler, step_plan=step_plan, steps=read, **part), reader
        )
        self.feed = Feed(
            loading.builder,
            loading.requests,
            accelerator,
            num_workers=recipe.data.num_workers,
            prefetch=recipe.data.prefetch,
            stall_seconds=recipe.data.stall_seconds,
            replay=replay,
            taken=follow_stream(recipe, state, accelerator),
        )
        return self.feed

    def synchronised(self, batch: Batch) -> AbstractContextManager[None]:
        """Exchange gradients with the step's last micro-batch only."""
        if batch.request.last:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.model)
        return context
