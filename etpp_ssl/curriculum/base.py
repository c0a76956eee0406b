"""Stages as data, and the pure function from an optimizer step to its stage.

A run spends its budget of E equivalent epochs, the compute of E epochs at full resolution, on stages
that own shares of COMPUTE: samples(stage) = share * E * N * (full area / stage area)
(EfficientTrain++, section 4.3).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field, model_validator

from etpp_ssl.config import Config, UserError, as_pair, show_size


class ReplaySpec(Config):
    """Train on each loaded image several times, for a host whose data workers cannot keep up
    (EfficientTrain++, replay buffer)."""

    times: int = Field(ge=1)
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

    @model_validator(mode="after")
    def _positive(self) -> StageSpec:
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}: a stage takes a share of compute in (0, 1]")
        if min(as_pair(self.bandwidth)) < 1:
            raise ValueError(f"bandwidth is {self.bandwidth}: at least one pixel per axis is shown")
        return self


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
    def samples(self) -> range:
        """Numbers, in the run, of the samples that `step` loads: all that it trains on, without replay."""
        size = self.batch_size // self.times
        start = self.first_sample + (self.step - self.first_step) * size
        return range(start, start + size)

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
        shares: (bandwidth, share of compute) of each stage; the last one shows the full image.
        image_size: (H, W) in pixels.
        num_images: images in the data set.
        batch_size: images per optimizer step, over all processes.
        budget_epochs: equivalent epochs, > 0.
        replays: each stage's replay, None for none.

    Attributes:
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
        shares: Sequence[tuple[tuple[int, int], float]],
        *,
        image_size: tuple[int, int],
        num_images: int,
        batch_size: int,
        budget_epochs: float,
        replays: Sequence[ReplaySpec | None] | None = None,
    ) -> None:
        self.image_size = image_size
        full_area = image_size[0] * image_size[1]
        budget = budget_epochs * num_images
        stages: list[Stage] = []
        spent = due = 0.0
        step = sample = slot = 0
        for index, (bandwidth, share) in enumerate(shares):
            cost = batch_size * bandwidth[0] * bandwidth[1] / full_area
            due += share * budget
            # Rounding against what is due so far keeps the whole run within half a step of its budget.
            num_steps = max(1, round((due - spent) / cost))
            replay = None if replays is None else replays[index]
            stage = Stage(
                index, bandwidth, share, batch_size, step, num_steps, sample, step, spent, slot, replay
            )
            if batch_size % stage.times:
                raise UserError(
                    f"curriculum: stage {index + 1} has replay.times {stage.times}, which does not divide "
                    f"its batch of {batch_size}"
                )
            stages.append(stage)
            spent += num_steps * cost
            step += num_steps
            sample += num_steps * len(stage.samples)
            slot += num_steps * batch_size
        self.num_steps = step
        self.num_samples = sample
        self.num_slots = slot
        self.equivalent_epochs = spent / num_images
        self._total = spent
        self._costs = [s.bandwidth[0] * s.bandwidth[1] * batch_size / full_area for s in stages]
        self._spent = [stage.progress for stage in stages]
        self._starts = [stage.first_step for stage in stages]
        self.stages = [replace(stage, progress=stage.progress / spent) for stage in stages]

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step, 0 <= step < num_steps, callable in any order.

        Raises:
            IndexError: if the step is outside the run.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside a run of {self.num_steps} steps")
        index = bisect_right(self._starts, step) - 1
        stage = self.stages[index]
        spent = self._spent[index] + (step - stage.first_step) * self._costs[index]
        return replace(stage, step=step, progress=spent / self._total)

    @property
    def spans(self) -> list[tuple[float, float]]:
        """The progress at which each stage begins and ends."""
        starts = [stage.progress for stage in self.stages]
        return list(zip(starts, [*starts[1:], 1.0], strict=True))

    def equivalent_epochs_after(self, step: int) -> float:
        """Equivalent epochs spent once `step` optimizer steps are done, 0 <= step <= num_steps."""
        if step == self.num_steps:
            return self.equivalent_epochs
        return self.stage_at(step).progress * self.equivalent_epochs


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
                f"{show_size(multiple)} px per axis; use at least {2 * multiple[axis]} there"
            )
    return rounded
