"""A checkpoint is whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.optim import Lamb

import etpp_ssl.train.checkpoint as checkpoint_module
from etpp_ssl.config import UserError
from etpp_ssl.recipe_base import CheckpointConfig
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.train.checkpoint import (
    CheckpointClock,
    clear_leftovers,
    load_checkpoint,
    optimizer_tensors,
    save_checkpoint,
)


def trained(width: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(width)
    model = torch.nn.Sequential(torch.nn.Linear(width, 2), torch.nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(
        [{"params": [model[0].weight]}, {"params": [model[0].bias, *model[1].parameters()]}], lr=0.1
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, width)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_model_optimizer_and_state_come_back_to_the_bit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    model, optimizer = trained()
    save_checkpoint(folder, 7, model, optimizer, {"state": 1 / 3}, keep=2)
    newest = folder.newest(print)
    assert newest is not None
    assert newest.step == 7
    torch.manual_seed(0)
    again = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    again_optimizer = torch.optim.AdamW(
        [{"params": [again[0].weight]}, {"params": [again[0].bias, *again[1].parameters()]}], lr=0.1
    )
    assert load_checkpoint(newest, again, again_optimizer)["state"] == 1 / 3
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    before, after = optimizer_tensors(model, optimizer), optimizer_tensors(again, again_optimizer)
    assert before.keys() == after.keys()
    assert len(before) == 4 * 3
    assert all(torch.equal(before[name], after[name]) for name in before)


class GroupCounter(torch.optim.SGD):
    """Counts steps per group in a plain int, as timm's Lamb did before it kept a tensor."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            group["lr"] = 0.1 / group["step"]
        super().step(closure)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "lamb": lambda groups: Lamb(groups, lr=0.1, max_grad_norm=None),
    "group-counter": lambda groups: GroupCounter(groups, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("regrouped", [False, True])
def test_every_optimizer_goes_on_to_the_bit(name: str, regrouped: bool, tmp_path: Path) -> None:
    def build(two_groups: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 1))
        model[1].bias.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = (trained[3:], trained[:3]) if two_groups else (trained,)
        return model, OPTIMIZERS[name]([{"params": part, "weight_decay": 0.1} for part in parts])

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            optimizer.step()

    folder = RunFolder(tmp_path)
    whole, whole_optimizer = build(True)
    train(whole, whole_optimizer, range(7))
    first, first_optimizer = build(True)
    train(first, first_optimizer, range(3))
    save_checkpoint(folder, 3, first, first_optimizer, {}, keep=1)
    again, again_optimizer = build(not regrouped)
    load_checkpoint(folder.checkpoints()[0], again, again_optimizer)
    train(again, again_optimizer, range(3, 7))
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    before = optimizer_tensors(whole, whole_optimizer)
    after = optimizer_tensors(again, again_optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("failing", ["save_tensors", "flush_folder", "take_place"])
def test_a_write_that_fails_leaves_the_old_checkpoint(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    model, optimizer = trained()
    save_checkpoint(folder, 1, model, optimizer, {}, keep=1)

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    target = checkpoint_module
    monkeypatch.setattr(target, failing, no_space)
    with pytest.raises(UserError, match=r"step 2 could not be written.*No space left"):
        save_checkpoint(folder, 2, model, optimizer, {}, keep=1)
    monkeypatch.undo()
    assert [c.step for c in folder.checkpoints()] == [1]
    assert folder.checkpoints()[0].fault() is None
    assert [path.name for path in folder.checkpoint_folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "overwritten"])
def test_damage_to_any_file_is_recognised(file: str, damage: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    model, optimizer = trained()
    save_checkpoint(folder, 1, model, optimizer, {}, keep=2)
    save_checkpoint(folder, 2, model, optimizer, {}, keep=2)
    path = folder.checkpoints()[0].path / file
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "overwritten":
        path.write_bytes(b"\xff" * len(content))
    else:
        path.unlink()
    said: list[str] = []
    newest = folder.newest(said.append)
    assert newest is not None
    assert newest.step == 1
    assert len(said) == 1
    assert "step-00000002 is damaged" in said[0]


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in (".writing-step-00000009", "step-x", "notes"):
        (folder.checkpoint_folder / name).mkdir(parents=True)
    assert folder.checkpoints() == []
    assert folder.newest(print) is None


def test_a_checkpoint_that_goes_while_one_reads_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    model, optimizer = trained()
    save_checkpoint(folder, 1, model, optimizer, {}, keep=1)
    real = Checkpoint.fault

    def fault(self: Checkpoint) -> str | None:
        if self.step == 1:
            save_checkpoint(folder, 2, model, optimizer, {}, keep=1)
        return real(self)

    monkeypatch.setattr(Checkpoint, "fault", fault)
    newest = folder.newest(pytest.fail)
    assert newest is not None
    assert newest.step == 2


def test_what_a_killed_run_has_left_is_cleared(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    model, optimizer = trained()
    for step in (1, 2, 3):
        save_checkpoint(folder, step, model, optimizer, {}, keep=9)
    place = folder.checkpoint_folder
    # A checkpoint of step 2 was about to take another one's place; the one of step 3 is of no use.
    (place / "step-00000002").rename(place / ".old-step-00000002")
    (place / ".writing-step-00000002").mkdir()
    (place / ".removing-step-00000000").mkdir()
    (place / ".removing-step-00000000" / "state.json").write_text("{}")
    assert [(c.step, c.fault()) for c in folder.checkpoints()] == [(3, None), (2, None), (1, None)]
    clear_leftovers(folder, 2)
    assert sorted(path.name for path in place.iterdir()) == ["step-00000001", "step-00000002"]
    # Here it had taken that place.
    (place / "step-00000001").rename(place / ".old-step-00000002")
    assert [c.path.name for c in folder.checkpoints()] == ["step-00000002"]
    clear_leftovers(folder, 2)
    assert [path.name for path in place.iterdir()] == ["step-00000002"]


def test_a_checkpoint_is_due_by_steps_or_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now)
    clock = CheckpointClock(CheckpointConfig(every_steps=5, every_minutes=2.0))
    assert [step for step in range(1, 11) if clock.due(step)] == [5, 10]
    now += 121
    assert clock.due(6)
    clock.start()
    assert not clock.due(7)
    never = CheckpointClock(CheckpointConfig(every_steps=None, every_minutes=None))
    now += 1e6
    assert not never.due(3)
