"""Where a run stands in its stream, if it reads one: checked, kept up to date, brought together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.streams.loader import StreamPlace
from etpp_ssl.data.training import TrainingImages
from etpp_ssl.run_state import TrainState


def check_stream(
    source: TrainingImages,
    curriculum: Curriculum,
    state: TrainState,
    *,
    num_processes: int,
    num_workers: int,
    micro_batch_size: int | None,
    name: str,
) -> None:
    """See that so many processes can read the training images, from where the run stands.

    Args:
        source: the training images.
        curriculum, state: of the run.
        num_processes, num_workers, micro_batch_size: how they would be read.
        name: of the data.

    Raises:
        UserError: if they cannot.
    """
    num_workers = max(1, num_workers)
    source.check_lanes(num_processes * num_workers)
    if not source.is_stream:
        return
    for stage in curriculum.stages:
        if stage.buffer_steps:
            raise UserError(
                f"curriculum: stage {stage.index + 1} has a replay buffer, which a resumed run refills by "
                f"index, but data.name {name} is a stream: leave replay out, or use indexed data"
            )
    if not state.streams:
        return
    places = [place for place in state.streams if place is not None]
    for what, before, now in (
        ("processes", len(state.streams), num_processes),
        ("data.num_workers", len(places[0]["lanes"]), num_workers),
        ("micro_batch_size", places[0]["micro_batch_size"], micro_batch_size),
    ):
        if before != now:
            raise UserError(
                f"the run's stream was read with {what} {before} and cannot be resumed with {now}: "
                f"use {before}, or --fork with another output, which begins the stream anew"
            )


def place_in_stream(state: TrainState, rank: int, num_workers: int) -> StreamPlace:
    """Where a process stands."""
    values = state.streams[rank] if state.streams else None
    return StreamPlace.beginning(num_workers) if values is None else StreamPlace.from_json(values)


def follow_stream(
    state: TrainState, accelerator: Accelerator, num_workers: int, micro_batch_size: int | None
) -> Callable[[Batch], None]:
    """What is told of each batch that is trained on, and keeps the process's place in `state`."""
    place = place_in_stream(state, accelerator.process_index, num_workers)

    def take(batch: Batch) -> None:
        nonlocal place
        if batch.cursor is None:
            return
        place = place.after(batch)
        entry: dict[str, Any] = {**place.to_json(), "micro_batch_size": micro_batch_size}
        others = state.streams or [None] * accelerator.num_processes
        rank = accelerator.process_index
        state.streams = [*others[:rank], entry, *others[rank + 1 :]]

    return take


def gather_streams(accelerator: Accelerator, state: TrainState) -> None:
    """Bring together where the processes stand; every process must call it."""
    own = state.streams[accelerator.process_index] if state.streams else None
    places = gather_object([own]) if accelerator.num_processes > 1 else [own]
    state.streams = places if any(place is not None for place in places) else []
