"""What a replay makes of steps that are not finite: real NaNs of every kind, and what came from outside."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_runs import Act, Seen, paint_images, watched
from spoilt_steps import poisoned

from etpp_ssl.cli import main
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.debug.report import diagnosis
from etpp_ssl.debug.reproduce import Reproduction, reproduce
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.launch import finetune, launch, pretrain
from etpp_ssl.train.nonfinite import NonFinite
from etpp_ssl.train.opening import open_run


def faulty(
    recipe: Recipe | FinetuneRecipe, before: dict[int, Act] | None = None, *, late: bool | None = None
) -> tuple[Reproduction, Seen]:
    """The replay of a run that ends at a step that is not finite, and what the run saw."""
    run = open_run(recipe)
    run.late_verdicts = late
    with watched(before=before) as seen, pytest.raises(NonFinite) as fault:
        launch(run)
    folder = Path(recipe.output) / "dumps" / f"step-{fault.value.step + 1:08d}"
    assert f"; etpp replay-nan {folder} shows where" in str(fault.value)
    assert list(folder.parent.iterdir()) == [folder]
    replayed = reproduce(folder)
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
        "model.mask_ratio={start: 0.3, end: 0.9}",
        "model.masking=block",
    ),
    "bf16, recomputed": ("precision=bf16", "model.grad_checkpointing=true", "micro_batch_size=4"),
}


@pytest.mark.parametrize("case", PRETRAINING)
def test_a_replay_computes_the_bits_of_the_run(case: str, tiny_recipe: Callable[..., Recipe]) -> None:
    with watched(dumps_at=(2, 9)) as seen, pytest.raises(KeyboardInterrupt):
        pretrain(tiny_recipe(*PRETRAINING[case]))
    assert len(seen.dumps) == 2
    for step, folder in seen.dumps.items():
        assert folder is not None
        replayed = reproduce(folder)
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
    with watched(dumps_at=(2, 9)) as seen, pytest.raises(KeyboardInterrupt):
        finetune(tiny_classifier(*CLASSIFIERS[case]))
    for step, folder in seen.dumps.items():
        assert folder is not None
        replayed = reproduce(folder)
        assert replayed.losses["loss"] == seen.losses[step]
        assert replayed.gradient_norm == seen.norms[step]


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
    assert re.fullmatch(
        r"reproduced: encoder.blocks.0.norm1 \(LayerNorm\) gives values that are not finite for inputs of up "
        r"to [\d.]+e\+25 and weights of up to 1, with sample 17 \(\S+.png\)",
        diagnosis(replayed),
    )


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
        model.get_parameter("decoder.norm.bias").zero_()
        model.get_parameter("decoder.head.weight").sign_().mul_(head)

    return act


FAULTS: dict[str, tuple[Act, str, str]] = {
    "huge weights": (scale(1e25), "fp32", "blocks.0.norm1 (LayerNorm) gives values that are not finite"),
    "a lost weight": (
        spoil("encoder.norm.weight", float("nan")),
        "fp32",
        "reproduced: weights are already not finite (encoder.norm.weight): the fault is before this step",
    ),
    "an overflow of bf16": (
        keys_beyond_bf16,
        "bf16",
        "of up to 3.4e+38, with every sample; overflow in bf16: ",
    ),
    "a huge output": (spoil("decoder.head.bias", 1e25), "bf16", "are finite, but not the loss, with every"),
    "a gradient alone": (
        steep_norm(1e-34, 1e38),
        "fp32",
        "the loss is finite, but not the gradient of decoder.norm.weight and of 33 parameters after it",
    ),
    "a norm alone": (
        steep_norm(1e-22, 1e22),
        "fp32",
        "are finite, but not the norm of their sum (the largest",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_diagnosis_names_the_fault(fault: str, tiny_recipe: Callable[..., Recipe]) -> None:
    act, precision, told = FAULTS[fault]
    replayed, _ = faulty(tiny_recipe(f"precision={precision}", "micro_batch_size=4"), {3: act})
    assert replayed.step == 3
    assert told in diagnosis(replayed)
    assert replayed.finite_in_fp32 == {"fp32": None, "bf16": "overflow in bf16" in told}[precision]


def test_a_verdict_that_is_read_late_dumps_the_step_that_it_is_about(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    replayed, seen = faulty(tiny_recipe(), {3: steep_norm(1e-34, 1e38)}, late=True)
    assert replayed.step == 3
    assert 4 in seen.losses, "the host has gone on by a step"
    assert math.isfinite(replayed.losses["loss"]), "so that the comparison of losses means something"


def test_a_classifiers_fault_is_found_in_its_mixed_images(
    tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    paint_images(tmp_path / "images", bright=KeyedOrder(64, seed=3).index(17))
    overrides = (
        *dark_and_bright(tmp_path / "images", 1e-39),
        "augment={rand_augment: null, ramp: false}",
        "evaluate.split=null",
        "micro_batch_size=5",
    )
    replayed, _ = faulty(tiny_classifier(*overrides))
    # The third of five is mixed with itself: no other sample gets a part of it.
    assert [(bad.rank, bad.number) for bad in replayed.micro_batches] == [(0, 1)]
    assert [(sample.number, sample.what) for sample in replayed.samples] == [(17, "input")]


def test_batch_norms_leave_the_sample_unknown_but_not_the_module(
    tiny_classifier: Callable[..., FinetuneRecipe],
) -> None:
    net = "model={name: resnet10t, args: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8], stem_width: 8}}"
    size = ("image_size=[64, 96]", "curriculum=constant", "batch_size=4", "evaluate.split=null")
    replayed, _ = faulty(tiny_classifier(net, *size, "data.num_images=16"), {1: scale(1e20)})
    assert not replayed.samples_apart
    assert replayed.bad_weights == (), "statistics that the step itself has spoilt are no weights"
    assert replayed.origin is not None
    assert replayed.origin.kind == "BatchNorm2d"


def replayed_by_command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["replay-nan", *arguments])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_what_came_from_outside_is_not_reproduced(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with poisoned(4), pytest.raises(NonFinite):
        pretrain(tiny_recipe())
    dump = tmp_path / "run/dumps/step-00000005"
    code, out, _ = replayed_by_command(str(dump), capsys=capsys)
    assert code == 1
    assert "not reproduced: loss and gradients of step 5 are finite here, so neither weights nor" in out
    record = json.loads((dump / "dump.json").read_text())
    record["environment"]["device"] = "Another GPU"
    (dump / "dump.json").write_text(json.dumps(record))
    code, out, _ = replayed_by_command(str(dump), capsys=capsys)
    assert code == 1
    assert "where kernels may round, and overflow, in another way: device Another GPU -> " in out


def test_the_command_reads_a_dump_that_was_moved_and_tries_remedies(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty(tiny_recipe("precision=bf16"), {3: keys_beyond_bf16})
    dump = (tmp_path / "run/dumps/step-00000004").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    file = tmp_path / "found.json"
    code, out, _ = replayed_by_command(str(dump), "optim.clip_grad=1", "--json", str(file), capsys=capsys)
    assert code == 0
    assert "first bad output" in out
    assert "optim.clip_grad=1 plays no part" in out
    found = json.loads(file.read_text())
    assert found["reproduced"] is True
    assert found["losses"]["loss"] == "nan"
    assert found["diagnosis"] in out
    assert found["origin"]["module"] == "encoder.blocks.0.attn.qkv"
    assert reproduce(dump, ["model.attention=fused"]).reproduced
    code, out, _ = replayed_by_command(str(dump), "precision=fp32", capsys=capsys)
    assert code == 1
    assert "not reproduced: loss and gradients of step 4 are finite with precision=fp32" in out
    assert not (tmp_path / "run").exists()
