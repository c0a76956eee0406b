"""The averaged weights: the closed form, bitwise resume, and what is averaged at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.train.checkpoint import load_tensors
from etpp_ssl.train.run import weight_average


def make_model(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def change(model: nn.Module, step: int) -> None:
    """Weights, statistics and counts of step `step`, whatever they were before."""
    generator = torch.Generator().manual_seed(step)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator))
        else:
            value.fill_(step)


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_it_is_the_closed_form_sum(decay: float, warmup: bool) -> None:
    model, steps = make_model(), 40
    average = weight_average(model, decay, warmup=warmup)
    seen: list[dict[str, torch.Tensor]] = []
    for step in range(1, steps + 1):
        change(model, step)
        average.update(model, step)
        seen.append({name: value.double() for name, value in model.state_dict().items()})
    decays = [min(decay, 1 - k ** (-2 / 3)) if warmup else decay for k in range(1, steps + 1)]
    decays[0] = 0.0
    weights = []
    for k in range(steps):
        weight = 1 - decays[k]
        for later in decays[k + 1 :]:
            weight *= later
        weights.append(weight)
    assert sum(weights) == pytest.approx(1)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = sum(weight * state[name] for weight, state in zip(weights, seen, strict=True))
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6, msg=name)
        else:
            assert value.item() == steps, name


def test_the_documented_sum_without_warm_up() -> None:
    model, d, n = make_model(), 0.8, 6
    average = weight_average(model, d)
    weights = []
    for step in range(1, n + 1):
        change(model, step)
        average.update(model, step)
        weights.append(model[0].weight.double())
    total = d ** (n - 1) * weights[0]
    for k in range(2, n + 1):
        total = total + (1 - d) * d ** (n - k) * weights[k - 1]
    torch.testing.assert_close(average.module[0].weight.double(), total, rtol=0, atol=1e-6)


def test_it_goes_on_to_the_bit_after_being_saved(tmp_path: Path) -> None:
    model = make_model()
    average = weight_average(model, 0.97, warmup=True)
    for step in range(1, 8):
        change(model, step)
        average.update(model, step)
        if step == 3:
            save_file(average.module.state_dict(), tmp_path / "ema.safetensors")
    again = make_model()
    resumed = weight_average(again, 0.97, warmup=True)
    load_tensors(resumed.module, load_file(tmp_path / "ema.safetensors"), "ema.safetensors")
    for step in range(4, 8):
        change(again, step)
        resumed.update(again, step)
    assert average.module.state_dict().keys() == model.state_dict().keys()
    for name, value in average.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


def test_the_trained_model_is_left_alone() -> None:
    model = make_model()
    model.train()
    average = weight_average(model, 0.9)
    change(model, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.update(model, 1)
    change(average.module, 5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in average.module.modules())
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_low_precision_weights_are_averaged_in_float32() -> None:
    # 0.001 of a difference of 1 is below bfloat16's resolution at 1.
    model = nn.Linear(2, 2).bfloat16()
    average = weight_average(model, 0.999)
    for step, value in ((1, 1.0), (2, 2.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model, step)
    assert average.module.weight.dtype == torch.float32
    torch.testing.assert_close(average.module.weight, torch.full((2, 2), 1.001))


def test_the_average_of_another_model_is_refused() -> None:
    average = weight_average(make_model(), 0.9)
    other = weight_average(make_model(width=5), 0.9)
    with pytest.raises(
        UserError, match=r"ema.safetensors is of another model: 0.weight is \(4, 5\) instead of"
    ):
        load_tensors(average.module, other.module.state_dict(), "ema.safetensors")
