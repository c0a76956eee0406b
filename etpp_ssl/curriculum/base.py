"""Stages as data, and the pure function from an optimizer step to its stage.

A run spends its budget of E equivalent epochs, the compute of E epochs at full resolution, on stages
that own shares of COMPUTE: samples(stage) = share * E * N * (full area / stage area)
(EfficientTrain++, section 4.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypedDict

from pydantic import Field, model_validator

from etpp_ssl.config import Config, UserError, as_pair, show_size
from etpp_ssl.curriculum.cost import Segment, segments_from, whole_steps


class RunSizes(TypedDict):
    """What a curriculum is built from beside its own settings; see `EfficientTrain`."""

    image_size: tuple[int, int]
    multiple: tuple[int, int]
    num_images: int
    batch_size: int
    budget_epochs: float


class ReplaySpec(Config):
    """Train on each loaded image several times, for a host whose data workers cannot keep up
    (EfficientTrain++, replay buffer)."""

    times: int = Field(ge=1, le=10**6)
    """Images trained on per image loaded: a step loads a mini-batch of 1/`times` of its images and draws
    the rest from the buffer."""
    buffer: int = Field(ge=1)
    """Size of the buffer in loaded mini-batches, per process."""


class StageSpec(Config):
    """One stage as a recipe states it."""

    bandwidth: int | tuple[int, int]
    """Frequencies shown per axis, in pixels of the recipe's image size; an int means both axes, scaled
    by the aspect ratio for a rectangular image (it is the bandwidth of the shorter side)."""
    share: float
    """Share of the run's compute, in (0, 1]; the shares of all stages add up to 1."""
    replay: ReplaySpec | None = None
    """Repeat loaded images in this stage; None loads every image anew."""
    batch_factor: float | None = Field(default=None, gt=0, le=1000)
    """Global batch over the recipe's `batch_size`; None leaves it to the curriculum's `large_batch`."""

    @model_validator(mode="after")
    def _positive(self) -> StageSpec:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: a stage takes a share of compute in (0, 1]")
        if min(as_pair(self.bandwidth)) < 1:
            raise ValueError(f"bandwidth is {self.bandwidth}: at least one pixel per axis is shown")
        return self


@dataclass(frozen=True)
class Portion:
    """A stage before it is laid out in steps."""

    bandwidth: tuple[int, int]
    share: float
    """Share of the run's compute, in (0, 1]."""
    batch_size: int
    """Images per optimizer step, over all processes."""
    replay: ReplaySpec | None = None


@dataclass(frozen=True)
class Stage:
    """What one optimizer step shows, and where in the run it stands."""

    index: int
    bandwidth: tuple[int, int]
    """(height, width) of the low-frequency crop in pixels."""
    share: float
    """Share of the run's compute that the stage was given."""
    batch_size: int
    """Images per optimizer step, over all processes."""
    first_step: int
    num_steps: int
    first_sample: int
    """Number, in the run, of the stage's first sample."""
    step: int
    progress: float
    """Share of the run's compute spent before `step`, in [0, 1)."""
    first_slot: int
    """Images trained on before the stage, replayed ones included."""
    replay: ReplaySpec | None = None

    @property
    def times(self) -> int:
        """Images trained on per sample loaded."""
        return 1 if self.replay is None else self.replay.times

    @property
    def samples_per_step(self) -> int:
        """By how many samples of the data set's order the run advances with each step."""
        return self.batch_size // self.times

    @property
    def samples(self) -> range:
        """Numbers, in the run, of the samples that `step` loads: all that it trains on, without replay."""
        start = self.first_sample + (self.step - self.first_step) * self.samples_per_step
        return range(start, start + self.samples_per_step)

    @property
    def slots(self) -> range:
        """Numbers, in the run, of the images that `step` trains on: a replayed image gets a new one each
        time. Those of `samples`, in a run without replay."""
        start = self.first_slot + (self.step - self.first_step) * self.batch_size
        return range(start, start + self.batch_size)

    @property
    def buffer_steps(self) -> int:
        """Loaded mini-batches that the replay buffer keeps; 0 without replay."""
        return 0 if self.replay is None or self.times == 1 else min(self.replay.buffer, self.num_steps)

    @property
    def oldest_step(self) -> int:
        """The first step whose samples `step` may still train on: its own, without replay."""
        return max(self.first_step, self.step + 1 - max(1, self.buffer_steps))


class Curriculum:
    """A sequence of stages that covers every step of a run; holds no state.

    Args:
        portions: the stages; the last one shows the full image.
        image_size: (H, W) in pixels.
        num_images: images in the data set.
        budget_epochs: equivalent epochs, > 0.

    Attributes:
        portions: as given.
        step_costs: compute of one step of each stage, in images at full resolution.
        segments: the steps of each stage, one segment per stage unless `laid_out` says otherwise.
        stages: one `Stage` each, at its first step.
        num_steps: optimizer steps of the whole run.
        num_samples: images loaded in the whole run, later epochs counted.
        num_slots: images trained on in the whole run; more than `num_samples` with replay.
        equivalent_epochs: what the steps really cost, within a step of `budget_epochs` unless the
            budget is too small to give every stage one step.

    Raises:
        UserError: if a stage's `times` does not divide the batch.
    """

    def __init__(
        self,
        portions: Sequence[Portion],
        *,
        image_size: tuple[int, int],
        num_images: int,
        budget_epochs: float,
    ) -> None:
        self.image_size = image_size
        self.num_images = num_images
        self.portions = tuple(portions)
        full_area = image_size[0] * image_size[1]
        self.step_costs = [p.batch_size * p.bandwidth[0] * p.bandwidth[1] / full_area for p in portions]
        budget = budget_epochs * num_images
        for index, portion in enumerate(portions):
            times = 1 if portion.replay is None else portion.replay.times
            if portion.batch_size % times:
                raise UserError(
                    f"curriculum: stage {index + 1} has replay.times {times}, which does not divide "
                    f"its batch of {portion.batch_size}"
                )
        counts = whole_steps([p.share * budget for p in portions], self.step_costs)
        self._lay_out(
            segments_from(
                [(stage, portion.share) for stage, portion in enumerate(portions)],
                counts,
                self.step_costs,
                first_step=0,
                progress=0.0,
            )
        )

    def laid_out(self, segments: Sequence[Segment]) -> Curriculum:
        """The same stages over other steps, as a recorded plan says.

        Args:
            segments: in order and without gaps; every stage has at least one, and progress ends at 1.
        """
        other = copy(self)
        other._lay_out(segments)
        return other

    def _lay_out(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._starts = [segment.first_step for segment in segments]
        counts = [0] * len(self.portions)
        self._spent = []
        spent = 0.0
        for segment in segments:
            self._spent.append(spent)
            spent += segment.num_steps * self.step_costs[segment.stage]
            counts[segment.stage] += segment.num_steps
        self.equivalent_epochs = spent / self.num_images
        starts = {s.stage: s.spent / s.total for s in reversed(segments)}
        self.stages: list[Stage] = []
        step = sample = slot = 0
        for index, (portion, num_steps) in enumerate(zip(self.portions, counts, strict=True)):
            stage = Stage(
                index=index,
                bandwidth=portion.bandwidth,
                share=portion.share,
                batch_size=portion.batch_size,
                first_step=step,
                num_steps=num_steps,
                first_sample=sample,
                step=step,
                progress=starts[index],
                first_slot=slot,
                replay=portion.replay,
            )
            self.stages.append(stage)
            step += num_steps
            sample += num_steps * stage.samples_per_step
            slot += num_steps * stage.batch_size
        self.num_steps = step
        self.num_samples = sample
        self.num_slots = slot

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step, 0 <= step < num_steps, callable in any order.

        Raises:
            IndexError: if the step is outside the run.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside a run of {self.num_steps} steps")
        segment = self.segments[bisect_right(self._starts, step) - 1]
        spent = segment.spent + (step - segment.first_step) * self.step_costs[segment.stage]
        return replace(self.stages[segment.stage], step=step, progress=spent / segment.total)

    def progress_after(self, step: int) -> float:
        """Share of the run's compute spent once `step` steps are done, 0 <= step <= num_steps."""
        return 1.0 if step == self.num_steps else self.stage_at(step).progress

    @property
    def spans(self) -> list[tuple[float, float]]:
        """The progress at which each stage begins and ends."""
        starts = [stage.progress for stage in self.stages]
        return list(zip(starts, [*starts[1:], 1.0], strict=True))

    def equivalent_epochs_after(self, step: int) -> float:
        """Equivalent epochs spent once `step` optimizer steps are done, 0 <= step <= num_steps."""
        if step == self.num_steps:
            return self.equivalent_epochs
        index = bisect_right(self._starts, step) - 1
        segment = self.segments[index]
        spent = self._spent[index] + (step - segment.first_step) * self.step_costs[segment.stage]
        return spent / self.num_images

    def ends_segment(self, step: int) -> bool:
        """Whether a segment ends once `step` optimizer steps are done."""
        return step == self.num_steps or (step > 0 and step in self._starts)


def stage_batch(batch_size: int, factor: float) -> int:
    """A stage's global batch: `factor` times the recipe's, rounded so that it divides well.

    It is a multiple of the largest divisor of `batch_size` up to a sixteenth of it, so whatever number
    of processes divides that divisor, divides every stage's batch.
    """
    quantum = max(d for d in range(1, max(1, batch_size // 16) + 1) if batch_size % d == 0)
    return quantum * max(1, round(batch_size * factor / quantum))


def legal_bandwidth(
    bandwidth: tuple[float, float], image_size: tuple[int, int], multiple: tuple[int, int]
) -> tuple[int, int]:
    """Round a bandwidth to whole patches on each axis (nearest; ties go up).

    Raises:
        UserError: if it exceeds the image or leaves fewer than two patches on an axis.
    """
    rounded = (
        int(bandwidth[0] / multiple[0] + 0.5) * multiple[0],
        int(bandwidth[1] / multiple[1] + 0.5) * multiple[1],
    )
    asked = f"{bandwidth[0]:g}x{bandwidth[1]:g}"
    for axis in range(2):
        if bandwidth[axis] > image_size[axis]:
            raise UserError(
                f"curriculum bandwidth {asked} is larger than the image ({show_size(image_size)})"
            )
        if rounded[axis] < 2 * multiple[axis]:
            raise UserError(
                f"curriculum bandwidth {asked} leaves fewer than two patches of "
                f"{show_size(multiple)} px per axis; use at least {2 * multiple[axis]} there, in "
                f"curriculum.stages, or curriculum=constant"
            )
    return rounded
