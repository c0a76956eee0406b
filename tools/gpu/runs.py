"""Whole small runs: their bits, and what they do when a scale overflows, a step is NaN, or a worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from etpp_ssl.config import RunFault
from etpp_ssl.dist.accelerator import process_as_found
from etpp_ssl.recipe import FinetuneRecipe, Recipe, parse_any
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import launch
from etpp_ssl.train.loop import on_step_end
from etpp_ssl.train.nonfinite import NonFinite
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.run import Run
from gpu.parts import Cases, Failed, Figures, Place, same

BOTH = """
seed: 3
output: unused
image_size: [32, 48]
budget_epochs: 2
batch_size: 16
deterministic: true
data: {name: synthetic, num_images: 96, num_eval_images: 32, num_workers: 2, stall_seconds: 30}
curriculum:
  name: efficienttrain
  stages: [{bandwidth: [16, 24], share: 0.3}, {bandwidth: [32, 48], share: 0.7}]
checkpoint: {every_minutes: null, every_steps: 4}
"""
PRETRAIN = f"""{BOTH}
model:
  {{name: vit, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3,
    decoder: {{embed_dim: 32, depth: 1, num_heads: 2}}}}
optim: {{base_lr: 2e-2}}
"""
FINETUNE = f"""{BOTH}
task: finetune
model: {{name: vit, patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, drop_path: 0.3}}
optim: {{base_lr: 5e-2, clip_grad: 1.0, ema: 0.9}}
evaluate: {{split: null}}
"""
KINDS = {
    "pixels and HOG": (PRETRAIN, "target=combined"),
    "learned positions": (PRETRAIN, "model.pos_embed=learned"),
    "cross decoder, compiled": (
        PRETRAIN,
        "model.decoder={name: cross, embed_dim: 32, depth: 1, num_heads: 2}",
        "model.compiled=true",
    ),
    "classifier": (FINETUNE, "curriculum={name: constant}"),
    "classifier at stages": (FINETUNE,),
}
KILLED = """
import os, signal, sys
from etpp_ssl.recipe import load_any
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.loop import on_step_end

def kill(run):
    if run.state.step == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

on_step_end.append(kill)
recipe = load_any(sys.argv[1])
(pretrain if recipe.task == "pretrain" else finetune)(recipe)
"""
"""A run that is killed after so many steps, where it has so many."""
KILL_AT, POISONED, OVERFLOW_AT = 6, (5, 9), 2


def recipe_of(place: Place, name: str, text: str, *overrides: str) -> Recipe | FinetuneRecipe:
    """A recipe whose run is in the part's folder."""
    return parse_any(text, [f"output={place.folder / name}", *overrides])


@process_as_found()
def trained(recipe: Recipe | FinetuneRecipe, change: Callable[[Run], None] | None = None) -> Run:
    """Train, or resume; `change` sees the opened run before."""
    run = open_run(recipe)
    if change is not None:
        change(run)
    launch(run)
    return run


def in_another_process(recipe: Recipe | FinetuneRecipe, kill_at: int = 0) -> int:
    """Train in a process of its own, killed after a step; its exit code."""
    file = Path(recipe.output).with_suffix(".yaml")
    recipe.save(file)
    return subprocess.run([sys.executable, "-c", KILLED, str(file), str(kill_at)], check=False).returncode


def tensors_of(output: str | Path) -> dict[str, Tensor]:
    """Weights, optimizer and average of a run's newest checkpoint."""
    checkpoint = RunFolder(output).checkpoints()[0]
    return {**checkpoint.model(), **checkpoint.optimizer(), **(checkpoint.average() or {})}


def same_tensors(one: str | Path, other: str | Path, **figures: float | int | str) -> Figures:
    """That two runs have come to the same bits."""
    first, second = tensors_of(one), tensors_of(other)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    return same(not differing and first.keys() == second.keys(), f"{len(differing)} tensors", **figures)


@contextmanager
def at_step_end(do: Callable[[Run], None]) -> Iterator[None]:
    """Call it after every optimizer step of the runs inside."""
    on_step_end.append(do)
    try:
        yield
    finally:
        on_step_end.remove(do)


def deterministic(place: Place) -> Cases:
    """The same recipe twice, and once killed and resumed, in bf16 and in fp32."""
    for kind, (text, *keys) in KINDS.items():
        for precision in ("bf16", "fp32"):
            if place.smoke and (precision == "bf16" or "compiled" in kind):
                continue

            def made(
                name: str, kind: str = kind, text: str = text, keys: Any = keys, of: str = precision
            ) -> Any:
                where = f"{kind}-{of}-{name}".replace(" ", "_").replace(",", "")
                return recipe_of(place, where, text, *keys, f"precision={of}")

            @cache
            def once(made: Callable[[str], Any] = made) -> str:
                output: str = trained(made("once")).recipe.output
                return output

            def twice(made: Callable[[str], Any] = made, once: Callable[[], str] = once) -> Figures:
                return same_tensors(once(), trained(made("twice")).recipe.output)

            def resumed(made: Callable[[str], Any] = made, once: Callable[[], str] = once) -> Figures:
                recipe = made("killed")
                if in_another_process(recipe, KILL_AT) != -signal.SIGKILL:
                    raise Failed("the run was not killed")
                found = RunFolder(recipe.output).checkpoints()[0].step
                return same_tensors(once(), trained(recipe).recipe.output, resumed_at=found)

            yield f"{kind}, {precision}, twice", twice
            if not (place.smoke and kind != "classifier"):
                yield f"{kind}, {precision}, killed and resumed", resumed


def overflow(place: Place) -> Cases:
    """A loss scale that is far too high: steps are left out until it fits, also across a resume."""

    class Crash(Exception):
        pass

    def raise_scale(run: Run) -> None:
        if run.state.step == OVERFLOW_AT:
            run.accelerator.scaler.update(2.0**34)

    def crash(run: Run) -> None:
        if run.state.step == KILL_AT:
            raise Crash

    def run(text: str) -> Figures:
        place.needs_gpu()
        whole, cut = (recipe_of(place, name, text, "precision=fp16") for name in ("whole", "cut"))
        with at_step_end(raise_scale):
            run = trained(whole)
            with suppress(Crash), at_step_end(crash):
                trained(cut)
            trained(cut)
        tensors = tensors_of(whole.output)
        steps = max(int(value) for name, value in tensors.items() if name.endswith(".step"))
        figures = {
            "steps left out": run.curriculum.num_steps - steps,
            "scale": run.accelerator.scaler.get_scale(),
        }
        if not all(value.isfinite().all() for value in tensors.values()):
            raise Failed("weights or moments are not finite", figures)
        if not 0 < figures["steps left out"] < run.curriculum.num_steps - OVERFLOW_AT:
            raise Failed("no step, or every step, was left out", figures)
        return same_tensors(whole.output, cut.output, **figures)

    yield "pre-training", lambda: run(PRETRAIN)
    yield "classifier", lambda: run(FINETUNE)


def poison(run: Run, *, once: bool = False) -> None:
    """Show the model NaN in the steps `POISONED`, counted from 0, every time or where they are met first."""
    met: set[int] = set()

    def spoil(model: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        step = run.state.step
        if not model.training or step not in POISONED or (once and step in met):
            return None
        met.add(step)
        return (arguments[0] * float("nan"), *arguments[1:])

    run.model.register_forward_pre_hook(spoil)


def nonfinite(place: Place) -> Cases:
    """Steps that are not finite, where the host learns it before the optimizer steps, or a step later."""

    def skip(kind: str, text: str) -> Figures:
        outputs = []
        for late in (False, True):
            recipe = recipe_of(place, f"skip-{kind}-{late}", text, "nonfinite.policy=skip")

            def change(run: Run, late: bool = late) -> None:
                poison(run)
                run.late_verdicts = late

            run = trained(recipe, change)
            if run.state.num_skipped != len(POISONED):
                raise Failed(f"{run.state.num_skipped} steps were left out, not {len(POISONED)}")
            outputs.append(recipe.output)
        return same_tensors(*outputs)

    def stop() -> Figures:
        recipe = recipe_of(place, "stop", PRETRAIN)
        try:
            trained(recipe, poison)
        except NonFinite as fault:
            if fault.step != POISONED[0]:
                raise Failed(f"step {fault.step} was named, not {POISONED[0]}") from fault
            return {
                "named step": fault.step + 1,
                "dumps": len(list(RunFolder(recipe.output).dump_folder.iterdir())),
            }
        raise Failed("the run did not stop")

    def rewind() -> Figures:
        recipe = recipe_of(place, "rewind", PRETRAIN, "nonfinite.policy=rewind", "nonfinite.max_rewinds=2")
        run = trained(recipe, partial(poison, once=True))
        if run.state.num_rewinds != len(POISONED) or not run.finished:
            raise Failed(f"{run.state.num_rewinds} rewinds")
        return {"rewinds": run.state.num_rewinds}

    yield "skipped at once and late, pre-training", lambda: skip("pretrain", PRETRAIN)
    yield "skipped at once and late, classifier", lambda: skip("finetune", FINETUNE)
    yield "stopped", stop
    yield "rewound", rewind


def workers(place: Place) -> Cases:
    """A data worker is killed, behind pinned memory on a GPU: the run says so, and is resumed here."""

    def run() -> Figures:
        whole, cut = (recipe_of(place, name, PRETRAIN) for name in ("whole", "cut"))
        trained(whole)
        killed_at: list[float] = []

        def kill_a_worker(run: Run) -> None:
            if run.state.step == KILL_AT and not killed_at:
                own = psutil.Process()
                children = [child for child in own.children() if child.cmdline() == own.cmdline()]
                os.kill(children[0].pid, signal.SIGKILL)
                killed_at.append(time.monotonic())

        try:
            with at_step_end(kill_a_worker):
                trained(cut)
        except RunFault as fault:
            seconds, said = time.monotonic() - killed_at[0], str(fault)
            if "worker" not in said:
                raise Failed(f"the run said {said!r}") from fault
        else:
            raise Failed("the run did not notice")
        trained(cut)
        return same_tensors(whole.output, cut.output, seconds_until_said=seconds)

    yield "a worker is killed", run


def second(place: Place) -> Cases:
    """A deterministic run after one that was not, against the same run in a process of its own."""

    def run() -> Figures:
        alone, after = (recipe_of(place, name, PRETRAIN, "precision=bf16") for name in ("alone", "after"))
        if in_another_process(alone):
            raise Failed("the run in its own process failed")
        trained(recipe_of(place, "before", FINETUNE, "deterministic=false"))
        memory = torch.cuda.memory_allocated() if place.device == "cuda" else 0
        trained(after)
        again = torch.cuda.memory_allocated() if place.device == "cuda" else 0
        return same_tensors(alone.output, after.output, bytes_left=memory, bytes_left_after_second=again)

    yield "two runs", run
