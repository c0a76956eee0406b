"""Runs that train a part of a classifier: the same bits whatever interrupts them; what reads them merges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from ranks import Server
from safetensors.torch import load_file

import etpp_ssl
from etpp_ssl.commands.evaluate import evaluate_run
from etpp_ssl.config import UserError
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import finetune
from etpp_ssl.train.plan import plan_run

Build = Callable[..., FinetuneRecipe]
LORA = ["model.train=lora", "model.lora_rank=4", "model.lora_layers=all", "optim.layer_decay=0.8"]


def tensors(folder: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(RunFolder(folder).checkpoints()[0].path / f"{file}.safetensors")


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in RunFolder(folder).metrics() if "loss" in row}


@pytest.fixture
def lora_run(tiny_classifier: Build, tmp_path: Path) -> Any:
    """With 20 steps, and a moving average."""
    return finetune(tiny_classifier(f"output={tmp_path / 'lora'}", *LORA))


def test_a_run_resumes_to_the_bit_and_keeps_what_is_frozen(
    lora_run: Any,
    tiny_classifier: Build,
    tmp_path: Path,
    crash_after: Callable[[int], AbstractContextManager[None]],
) -> None:
    recipe = tiny_classifier(f"output={tmp_path / 'cut'}", "checkpoint.every_steps=3", *LORA)
    with crash_after(11):
        finetune(recipe)
    finetune(tiny_classifier(f"output={tmp_path / 'cut'}", *LORA))
    for file in ("model", "ema", "optimizer"):
        whole, cut = tensors(tmp_path / "lora", file), tensors(tmp_path / "cut", file)
        assert whole.keys() == cut.keys()
        assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    start = tiny_classifier(*LORA).build_model(10)
    trained = {name for name, p in start.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0] for name in tensors(tmp_path / "lora", "optimizer")} == trained
    ema, model = tensors(tmp_path / "lora", "ema"), tensors(tmp_path / "lora", "model")
    frozen = {name for name in model if name not in trained}
    assert frozen
    assert all(torch.equal(ema[name], model[name]) for name in frozen)
    assert all((ema[name] != model[name]).any() for name in trained)


def test_whatever_reads_a_run_gets_the_merged_network(
    lora_run: Any, tiny_classifier: Build, tmp_path: Path
) -> None:
    source = tmp_path / "lora"
    images = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    net = timm.create_model(f"local-dir:{export(source)}", pretrained=True).eval()
    encoder = etpp_ssl.load(source).model
    file = RunFolder(source).checkpoints()[0].path / "ema.safetensors"
    (tmp_path / "weights.safetensors").write_bytes(file.read_bytes())
    with torch.no_grad():
        exported, unmerged = net(images), lora_run.trained_model()(images)
        assert torch.equal(encoder(images), exported)
    assert 0 < (exported - unmerged).abs().max() < 2e-6 * unmerged.abs().max()
    assert not any("lora" in name for name in encoder.state_dict())
    evaluated = evaluate_run(lora_run.recipe, lora_run.folder, print).result.numbers()
    assert evaluated["eval_loss"] == pytest.approx(lora_run.newest["eval_loss"], rel=1e-5)
    # A new run starts from it, and a file of its weights gives the same start.
    for init in (source, tmp_path / "weights.safetensors"):
        for train in ("head", "lora"):
            recipe = tiny_classifier(f"init={init}", f"model.train={train}", f"output={tmp_path / 'no'}")
            task = etpp_ssl.train.opening.bare_task(recipe, torch.device("cpu"), 10, lambda build: build())
            task.load_init(str(init), lambda line: None)
            with torch.no_grad():
                assert torch.equal(task.model.eval()(images), exported)


def test_two_processes_give_the_loss_curve_of_one(
    tiny_classifier: Build, tmp_path: Path, ranks: Server
) -> None:
    plain = [*LORA, "augment.mixup=0", "augment.cutmix=0", "budget_epochs=0.8"]
    finetune(tiny_classifier(f"output={tmp_path / 'one'}", *plain))
    file = tmp_path / "recipe.yaml"
    tiny_classifier(f"output={tmp_path / 'two'}", *plain).save(file)
    ranks.run(["finetune", str(file)], 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_another_way_of_training_is_another_run(
    lora_run: Any, tiny_classifier: Build, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"was started with other settings: .*model.train"):
        finetune(tiny_classifier(f"output={tmp_path / 'lora'}", "model.train=head"))


def test_the_plan_counts_memory_and_compute_of_what_is_trained(
    tiny_classifier: Build, tmp_path: Path
) -> None:
    def plan(train: str, *overrides: str) -> Any:
        return plan_run(tiny_classifier(f"model.train={train}", f"init={tmp_path}", *overrides))

    all_, head, last = plan("all"), plan("head"), plan("last_1")
    assert all_.parameters == head.parameters
    assert head.total_flops < last.total_flops < all_.total_flops
    assert head.total_flops < 0.4 * all_.total_flops
    # Weights and their average, and of what is trained gradient and two moments, all in float32. AdamW keeps
    # a step of 4 bytes with each tensor, too.
    for one, trained in ((all_, all_.parameters), (head, 16 * 10 + 10)):
        row, moments = one.stages[-1], 4 * 2 * trained
        assert moments < one.optimizer.state_bytes < moments + 4 * 100
        held = 4 * (2 * one.parameters + trained) + one.optimizer.state_bytes
        assert row.memory_bytes == held + 4 * row.micro_batch * row.cost.peak_values
    sgd = plan("all", "optim.name=sgd", "optim.ema=null")
    assert sgd.optimizer.state_bytes == 4 * all_.parameters
    less = 4 * all_.parameters + all_.optimizer.state_bytes - sgd.optimizer.state_bytes
    assert sgd.stages[-1].memory_bytes == all_.stages[-1].memory_bytes - less
    assert "0.01 M parameters, 0.00017 M of them trained (head)" in head.title
    assert "trained" not in all_.title
    warning = "warning: model.train is head, and without init the frozen part keeps random weights"
    assert not any(note.startswith(warning) for note in head.notes)
    assert any(note.startswith(warning) for note in plan_run(tiny_classifier("model.train=head")).notes)
