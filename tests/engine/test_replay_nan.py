"""Dumps of steps that are not finite, and what a replay makes of them; real NaNs of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.engine import finetune as classifier_loop
from etpp_ssl.engine import nonfinite
from etpp_ssl.engine import pretrain as loop
from etpp_ssl.engine.dump import write_dump
from etpp_ssl.engine.finetune import finetune
from etpp_ssl.engine.nonfinite import Guard, NonFinite
from etpp_ssl.engine.pretrain import pretrain
from etpp_ssl.engine.records import log_due
from etpp_ssl.engine.replay_nan import Replayed, replay_nan
from etpp_ssl.engine.replay_report import diagnosis
from etpp_ssl.engine.run import BaseRun
from etpp_ssl.recipe import FinetuneRecipe, Recipe

Act = Callable[[Any], None]


@dataclass
class Seen:
    """What a run itself had at the steps that it judged."""

    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    dumps: dict[int, Path | None] = field(default_factory=dict)


@contextmanager
def watched(*, dumps_at: Sequence[int] = (), before: dict[int, Act] | None = None) -> Iterator[Seen]:
    """Runs that note losses and gradient norms, dump healthy steps, and whose model is changed at times.

    Args:
        dumps_at: steps to dump whatever they are like; the last one ends the run.
        before: what to do with the model before a step.
    """
    seen = Seen()
    real_verdict, real_whole = Guard._verdict, nonfinite._whole
    judged = -1

    def verdict(self: Guard) -> Tensor:
        nonlocal judged
        judged = self.run.state.step
        seen.losses[judged] = float(self.meter.step_loss())
        bad = real_verdict(self)
        if judged in dumps_at:
            seen.dumps[judged] = write_dump(self.run, judged, self.feed.kept[judged])
        return bad

    def whole(norm: Tensor) -> Tensor:
        seen.norms[judged] = float(norm)
        return real_whole(norm)

    def due(run: BaseRun) -> bool:
        if dumps_at and run.state.step > max(dumps_at):
            raise KeyboardInterrupt
        if before is not None and run.state.step in before:
            with torch.no_grad():
                before[run.state.step](run.bare_model)
        return log_due(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Guard, "_verdict", verdict)
        patch.setattr(nonfinite, "_whole", whole)
        patch.setattr(loop, "log_due", due)
        patch.setattr(classifier_loop, "log_due", due)
        yield seen


def run(recipe: Recipe | FinetuneRecipe) -> None:
    if isinstance(recipe, FinetuneRecipe):
        finetune(recipe)
    else:
        pretrain(recipe)


def faulty(recipe: Recipe | FinetuneRecipe, before: dict[int, Act] | None = None) -> tuple[Replayed, Seen]:
    """The replay of a run that ends at a step that is not finite, and what the run saw."""
    with watched(before=before) as seen, pytest.raises(NonFinite) as fault:
        run(recipe)
    folder = Path(recipe.output) / "dumps" / f"step-{fault.value.step + 1:08d}"
    assert f"; etpp replay-nan {folder} shows where" in str(fault.value)
    assert list(folder.parent.iterdir()) == [folder]
    replayed = replay_nan(folder)
    assert replayed.reproduced
    assert replayed.step == fault.value.step
    assert replayed.changes == ()
    np.testing.assert_array_equal(replayed.losses["loss"], seen.losses[replayed.step])
    np.testing.assert_array_equal(replayed.gradient_norm, seen.norms[replayed.step])
    return replayed, seen


COMBINED = "target={name: combined, parts: [{name: pixels}, {name: hog, cell: 4, weight: 0.5}]}"
REPLAY = (
    "curriculum.stages=[{bandwidth: [8, 12], share: 0.4, replay: {times: 2, buffer: 3}}, "
    "{bandwidth: [16, 24], share: 0.6}]"
)
PRETRAINING: dict[str, tuple[str, ...]] = {
    "micro-batches that do not divide": ("micro_batch_size=4",),
    "lanczos and a clipped norm": ("curriculum.crop=lanczos", "optim.clip_grad=0.01"),
    "replay buffer": (REPLAY, "micro_batch_size=4"),
    "cross decoder, combined target, ramp": (
        "model.decoder=cross",
        "model.decoder.predict_ratio=0.25",
        COMBINED,
        "model.mask_ratio={start: 0.5, end: 0.75}",
        "model.masking=block",
    ),
    "bf16, recomputed": ("precision=bf16", "model.grad_checkpointing=true", "micro_batch_size=4"),
}


@pytest.mark.parametrize("case", PRETRAINING)
def test_a_replay_computes_the_bits_of_the_run(case: str, tiny_recipe: Callable[..., Recipe]) -> None:
    with watched(dumps_at=(2, 5)) as seen, pytest.raises(KeyboardInterrupt):
        pretrain(tiny_recipe(*PRETRAINING[case]))
    assert len(seen.dumps) == 2
    for step, folder in seen.dumps.items():
        assert folder is not None
        replayed = replay_nan(folder)
        assert not replayed.reproduced
        assert replayed.losses["loss"] == seen.losses[step]
        assert replayed.gradient_norm == seen.norms[step]
    if "combined" in case:
        assert replayed.losses.keys() == {"loss", "loss_norm_pixels", "loss_hog"}


CLASSIFIERS: dict[str, tuple[str, ...]] = {
    "erased, mixed, averaged": ("micro_batch_size=4", "optim.ema=0.9", "augment.erasing=0.5"),
    "replay buffer, lanczos": (REPLAY, "curriculum.crop=lanczos"),
    "recomputed": ("model.grad_checkpointing=true", "micro_batch_size=4"),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_replay_computes_the_bits_of_a_classifiers_run(
    case: str, tiny_classifier: Callable[..., FinetuneRecipe]
) -> None:
    with watched(dumps_at=(2, 5)) as seen, pytest.raises(KeyboardInterrupt):
        finetune(tiny_classifier(*CLASSIFIERS[case]))
    for step, folder in seen.dumps.items():
        assert folder is not None
        replayed = replay_nan(folder)
        assert replayed.losses["loss"] == seen.losses[step]
        assert replayed.gradient_norm == seen.norms[step]


def paint_images(folder: Path, *, bright: int, size: tuple[int, int] = (16, 24), count: int = 64) -> None:
    """Black images, and a white one."""
    (folder / "train").mkdir(parents=True)
    for index in range(count):
        value = 255 if index == bright else 0
        Image.new("RGB", size[::-1], (value,) * 3).save(folder / "train" / f"{index:02d}.png")


def dark_and_bright(folder: Path, std: float) -> tuple[str, ...]:
    """Overrides for black images that stay zero, while the white one grows to 1 / `std`."""
    return (
        "data=folder", f"data.root={folder}", "data.mean=[0, 0, 0]", f"data.std=[{std}, {std}, {std}]",
    )  # fmt: skip


@pytest.mark.parametrize("crop", ["fourier", "lanczos"])
def test_an_image_that_overflows_in_the_normalisation_is_named(
    crop: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    bright = KeyedOrder(64, seed=3).index(17)
    paint_images(tmp_path / "images", bright=bright)
    data = dark_and_bright(tmp_path / "images", 1e-39)
    replayed, _ = faulty(tiny_recipe(*data, f"curriculum.crop={crop}", "micro_batch_size=4"))
    assert replayed.step == 1
    assert [(bad.rank, bad.number) for bad in replayed.micro_batches] == [(0, 1)]
    (sample,) = replayed.samples
    assert (sample.number, sample.index, sample.what) == (17, bright, "input")
    assert sample.name.endswith(f"{bright:02d}.png")
    assert diagnosis(replayed) == (
        f"reproduced: the input of sample 17 ({sample.name}) is not finite once it is normalised: data.mean "
        f"and data.std do not suit it"
    )


def test_an_image_that_overflows_in_the_network_is_named_with_the_module(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    paint_images(tmp_path / "images", bright=KeyedOrder(64, seed=3).index(17))
    replayed, _ = faulty(tiny_recipe(*dark_and_bright(tmp_path / "images", 1e-25), "micro_batch_size=4"))
    assert [(sample.number, sample.what) for sample in replayed.samples] == [(17, "loss")]
    assert replayed.origin is not None
    assert "are finite, but not the loss with sample 17 (" in diagnosis(replayed)


def scale(factor: float) -> Act:
    def act(model: torch.nn.Module) -> None:
        for parameter in model.parameters():
            parameter.mul_(factor)

    return act


def spoil(name: str, value: float) -> Act:
    def act(model: torch.nn.Module) -> None:
        model.get_parameter(name).flatten()[-1:].fill_(value)

    return act


def keys_beyond_bf16(model: torch.nn.Module) -> None:
    """Attention whose keys are finite in float32 alone, and are multiplied by zero."""
    qkv = model.get_submodule("encoder.blocks.0.attn.qkv")
    qkv.weight.zero_()
    qkv.bias.zero_()
    qkv.bias.view(3, -1)[1] = 3.4e38


def steep_norm(gain: float, head: float) -> Act:
    """A tiny norm before a huge head: predictions are moderate, gradients are not."""

    def act(model: torch.nn.Module) -> None:
        model.get_parameter("decoder.norm.weight").fill_(gain)
        model.get_parameter("decoder.head.weight").sign_().mul_(head)

    return act


FAULTS: dict[str, tuple[Act, str, str]] = {
    "huge weights": (scale(1e25), "fp32", "Linear) gives values that are not finite for inputs of up to"),
    "a lost weight": (
        spoil("encoder.norm.weight", float("nan")),
        "fp32",
        "reproduced: weights are already not finite (encoder.norm.weight): the fault is before this step",
    ),
    "an overflow of bf16": (keys_beyond_bf16, "bf16", "overflow in bf16: finite in fp32"),
    "a huge output": (spoil("decoder.head.bias", 1e25), "bf16", "are finite, but not the loss with every"),
    "a gradient alone": (
        steep_norm(1e-34, 1e38),
        "fp32",
        "the loss is finite, but not the gradient of decoder.norm.bias, decoder.norm.weight",
    ),
    "a norm alone": (
        steep_norm(1e-22, 1e22),
        "fp32",
        "every gradient is finite, but not their sum or its norm",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_diagnosis_names_the_fault(fault: str, tiny_recipe: Callable[..., Recipe]) -> None:
    act, precision, told = FAULTS[fault]
    replayed, _ = faulty(tiny_recipe(f"precision={precision}", "micro_batch_size=4"), {3: act})
    assert replayed.step == 3
    print(diagnosis(replayed), replayed)
    assert told in diagnosis(replayed)
    assert replayed.finite_in_fp32 == {"fp32": None, "bf16": "finite in fp32" in told}[precision]
