"""What a training step would wait for on a GPU, counted on a CPU: nothing but for rows and checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu.synchronisations import WaitCounter, waits_of_steps

from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.train.nonfinite import on_gradients
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.run import Run

SHORT = ("budget_epochs=0.5", "log_every_steps=4")


def waits(recipe: Recipe | FinetuneRecipe, *, late: bool = True) -> list[list[str]]:
    """Those of each step; `late` as with a fused AdamW on a GPU."""
    run = open_run(recipe)
    run.late_verdicts = late
    found = waits_of_steps(run)
    assert len(found) == run.curriculum.num_steps > len(run.curriculum.stages) + 1
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        ("micro_batch_size=4", "optim.clip_grad=1.0", "model.grad_checkpointing=true", "target=combined",
         "model.mask_ratio={start: 0.6, end: 0.75}", "model.masking=block", "model.pos_embed=learned"),
        ("model.decoder=cross", "target=hog", "model.masking=grid", "curriculum.stages=[{bandwidth: [8, 12], "
         "share: 0.5, replay: {times: 2, buffer: 4}}, {bandwidth: [16, 24], share: 0.5}]"),
    ],
    ids=["many keys", "cross, hog, replay"],
)  # fmt: skip
def test_no_step_of_pretraining_waits(tiny_recipe: Callable[..., Recipe], overrides: tuple[str, ...]) -> None:
    assert not [step for step in waits(tiny_recipe(*SHORT, *overrides)) if step]


def test_no_step_of_finetuning_waits(tiny_classifier: Callable[..., FinetuneRecipe]) -> None:
    assert not [step for step in waits(tiny_classifier(*SHORT, "evaluate.split=null")) if step]


def test_a_verdict_before_the_step_is_one_wait(tiny_classifier: Callable[..., FinetuneRecipe]) -> None:
    found = waits(tiny_classifier(*SHORT, "evaluate.split=null", "optim.name=sgd"), late=False)
    assert {len(step) for step in found} == {0, 1}, "one, but in a stage's first step"
    assert sum(map(len, found)) == len(found) - 3
    assert "train/nonfinite.py" in next(step for step in found if step)[0]


def test_a_value_that_is_read_in_a_step_is_found(tiny_recipe: Callable[..., Recipe]) -> None:
    def read(run: Run, loss: torch.Tensor, norm: torch.Tensor) -> None:
        assert float(loss) > 0

    on_gradients.append(read)
    try:
        found = waits(tiny_recipe(*SHORT))
    finally:
        on_gradients.remove(read)
    assert {len(step) for step in found} == {0, 1}
    assert sum(map(len, found)) == len(found) - 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: bool((x > 1).any()),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: torch.equal(x, x + 1),
        lambda x: (x + torch.tensor([1.0, 2.0], device=torch.device("cpu"))).sum(),
        lambda x: torch.zeros(2).copy_(x),
        lambda x: x.copy_(torch.zeros(2)),
    ],
)
def test_every_kind_of_wait_is_seen(read: Callable[[torch.Tensor], object]) -> None:
    on_device = torch.tensor([1.0, 2.0])
    with WaitCounter([on_device]) as counter:
        read(on_device * 2)
    assert len(counter.waits) == 1


def test_what_does_not_wait_is_not_counted() -> None:
    on_device, on_host = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, 2.0])
    with WaitCounter([on_device]) as counter:
        assert bool(on_host[0] == 1)
        there = on_host.to(torch.device("cpu"), non_blocking=True)
        assert on_host.tolist() == [1, 2], "the original stays the host's"
        (on_device * there).square().sum().backward()
        on_device.data[torch.arange(2, device=torch.device("cpu"))] += 1
        copy = torch.empty_like(on_device, device="cpu").copy_(on_device.detach(), non_blocking=True)
        assert copy.tolist() == [2, 3]
    assert not counter.waits
