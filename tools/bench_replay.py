"""Time training from a loader that is too slow, with and without a replay buffer.

    python tools/bench_replay.py [--times 4] [--rounds 6] [--steps 24]

The loader's worker is throttled to 1/times of the images that training takes when its batches are already
in memory. Each round times both ways, before and after it training from memory, which the throttle and the
ratios of that round go by: so a machine that others use too disturbs them less. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator

# See etpp_ssl/cli_app.py; it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator

from etpp_ssl.curriculum.base import Curriculum, ReplaySpec
from etpp_ssl.curriculum.efficienttrain import Constant
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.formats.base import Picture
from etpp_ssl.data.loader import Batch, BatchBuilder
from etpp_ssl.data.replay import Replay
from etpp_ssl.data.sampler import KeyedOrder, RequestSampler
from etpp_ssl.data.sources.synthetic import SyntheticConfig, SyntheticSource
from etpp_ssl.data.views import Normalise, TrainView
from etpp_ssl.model.masking import random_masking
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.batches import TrainingBatches

RECIPE = """
output: unused
image_size: 64
budget_epochs: 1
batch_size: 64
precision: fp32
data: {name: synthetic, num_images: 256}
curriculum: {name: constant}
model:
  name: vit
  patch_size: 8
  embed_dim: 96
  depth: 3
  num_heads: 3
  decoder: {embed_dim: 32, depth: 1, num_heads: 2}
"""
BUFFER = 64
"""Mini-batches."""
GOAL = 0.9
"""Wanted step rate with replay, of that from memory."""


class ThrottledSource(SyntheticSource):
    """Pictures drawn beforehand, handed out at a fixed rate by the worker that asks for them."""

    seconds_per_image = 0.0

    def __init__(self) -> None:
        config = SyntheticConfig(num_images=256)
        plain = config.open("train", in_chans=3, image_size=(64, 64), seed=0)
        vars(self).update(vars(plain))
        self._pictures = [plain.open(index) for index in range(len(plain))]
        self._due = 0.0

    def open(self, index: int) -> Picture:
        """A picture, not before it is due."""
        now = time.perf_counter()
        self._due = max(self._due + self.seconds_per_image, now)
        time.sleep(self._due - now)
        return self._pictures[index]


class Trainer:
    """Optimizer steps of a small model, from any batches."""

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe = recipe
        self.accelerator = accelerator
        self.model = recipe.build_model().to(accelerator.device)
        self.objective = recipe.build_objective()
        self.normalise = Normalise(*recipe.data.statistics(3), accelerator.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, batches: Iterator[Batch]) -> None:
        """One step, as in `train/pretrain.py`."""
        for batch in batches:
            images = low_frequency_crop(self.normalise(batch.images), batch.request.bandwidth)
            values, ids_removed = self.model(images, random_masking(batch.sample_ids, 64, 16, seed=0))
            (self.objective(values, ids_removed, images) * batch.request.weight).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=4, help="replay and throttle (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="steps per timing (default: %(default)s)")
    options = parser.parse_args()
    recipe = Recipe.parse(RECIPE)
    if min(options.times, options.rounds, options.steps) < 1 or recipe.batch_size % options.times:
        parser.error(f"--rounds and --steps take 1 or more, --times a divisor of {recipe.batch_size}")

    torch.manual_seed(0)
    trainer, source = Trainer(recipe, Accelerator(cpu=True)), ThrottledSource()
    replay = ReplaySpec(times=options.times, buffer=BUFFER)
    in_memory = list(open_feed(trainer, source, None, workers=0).step())
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; ViT 96x3, batch {recipe.batch_size}, "
        f"one worker throttled to 1/{options.times}; {options.rounds} rounds of {options.steps} steps: "
        f"median (min to max)"
    )
    rates: dict[str, list[float]] = {"from memory": [], "throttled": [], "throttled, replay": []}
    ratios: dict[str, list[float]] = {"throttled": [], "throttled, replay": []}
    waits: dict[str, list[float]] = {"throttled": [], "throttled, replay": []}

    def from_memory() -> float:
        return timed(memory_step(trainer, in_memory), warm_up=3, steps=options.steps // 2 + 1)[0]

    from_memory()
    for number in range(options.rounds):
        before = from_memory()
        source.seconds_per_image = options.times / (before * recipe.batch_size)
        round_rates = {}
        for name in sorted(ratios, reverse=bool(number % 2)):
            own = replay if name.endswith("replay") else None
            feed = open_feed(trainer, source, own, workers=1)
            # As many images loaded either way; the first are those that the worker has ready.
            shorten = 1 if own else options.times
            steps = max(1, options.steps // shorten)
            round_rates[name], wait = timed(feed_step(trainer, feed), warm_up=4, steps=steps)
            waits[name].append(100 * wait)
        bound = statistics.mean([before, from_memory()])
        source.seconds_per_image = 0.0
        rates["from memory"].append(bound)
        for name, rate in round_rates.items():
            rates[name].append(rate)
            ratios[name].append(rate / bound)
    for name, values in rates.items():
        print(f"  {name:18} {spread(values)} steps/s")
    for name, values in ratios.items():
        goal = f"   goal {GOAL:g}" if name.endswith("replay") else ""
        print(f"  {name + ' / from memory':32} {spread(values)}{goal}")
    for name, values in waits.items():
        print(f"  {name + ', waiting for data':32} {spread(values)} % of its time")


def open_feed(
    trainer: Trainer, source: ThrottledSource, replay: ReplaySpec | None, *, workers: int
) -> TrainingBatches:
    """Batches from the loader, more than will be asked for."""
    recipe = trainer.recipe
    order = KeyedOrder(len(source), seed=0)
    view = TrainView(image_size=recipe.size, crop_scale=(0.2, 1.0), flip=True, lanczos=False, seed=0)
    curriculum: Curriculum = Constant(
        image_size=recipe.size,
        num_images=len(source),
        batch_size=recipe.batch_size,
        budget_epochs=10_000.0,
        replay=replay,
    )
    return TrainingBatches(
        BatchBuilder(source, view, order),
        RequestSampler(order, curriculum.stage_at, range(curriculum.num_steps)),
        trainer.accelerator,
        num_workers=workers,
        prefetch=2,
        replay=Replay(curriculum.stage_at, 0, seed=0, say=print),
    )


def memory_step(trainer: Trainer, batches: list[Batch]) -> Callable[[], float]:
    """A step that waits for nothing."""

    def step() -> float:
        trainer.step(iter(batches))
        return 0.0

    return step


def feed_step(trainer: Trainer, feed: TrainingBatches) -> Callable[[], float]:
    """A step that gives the seconds it waited for the feed."""

    def step() -> float:
        trainer.step(feed.step())
        return feed.wait_seconds

    return step


def timed(step: Callable[[], float], *, warm_up: int, steps: int) -> tuple[float, float]:
    """Steps per second after a warm-up, and the share of that time spent waiting."""
    for _ in range(warm_up):
        step()
    start = time.perf_counter()
    waited = sum(step() for _ in range(steps))
    seconds = time.perf_counter() - start
    return steps / seconds, waited / seconds


def spread(values: list[float]) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
