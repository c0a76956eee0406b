"""The linear probe: its protocol step by step, resume, workers, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from probe_data import build, leaves_everything_as_it_was, with_workers, write_coloured
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.data.sampler import KeyedOrder
from etpp_ssl.data.views import ProbeView
from etpp_ssl.evaluation.linear import LinearConfig, LinearHead, LinearProbe
from etpp_ssl.evaluation.training import EpochSteps
from etpp_ssl.optim.lars import Lars
from etpp_ssl.recipe import Recipe

QUICK = ["probe=linear", "probe.epochs=30", "probe.warmup_epochs=3", "probe.base_lr=100"]
SHORT = ["probe=linear", "probe.epochs=4", "probe.warmup_epochs=1", "probe.base_lr=30",
         "probe.batch_size=24", "probe.micro_batch_size=7", "data.num_classes=6"]  # fmt: skip


def test_the_defaults_are_the_published_protocol() -> None:
    config = LinearConfig()
    assert (config.epochs, config.warmup_epochs, config.base_lr, config.batch_size) == (90, 10, 0.1, 16384)
    assert (config.weight_decay, config.momentum, config.crop_scale) == (0, 0.9, (0.08, 1.0))
    generator = torch.random.get_rng_state()
    head = LinearHead(300, 200, seed=0)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not head.linear.bias.any()
    assert (head.norm.affine, head.norm.eps) == (False, 1e-6)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}


def test_steps_of_an_epoch_drop_what_is_left_over() -> None:
    plan = EpochSteps(num_images=1_281_167, batch_size=16384, epochs=90, image_size=(224, 224))
    assert (plan.per_epoch, plan.num_steps) == (78, 7020)
    small = EpochSteps(num_images=10, batch_size=4, epochs=2, image_size=(8, 8))
    assert [list(small(step).samples) for step in range(4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17],
    ]  # fmt: skip


def test_it_equals_the_protocol_written_out(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe(*SHORT)
    probe, model = build(recipe)
    numbers = probe.run(model)

    model.eval()
    context, train = probe.context, probe.images.train
    view = ProbeView(recipe.size, (0.08, 1.0), True, recipe.seed)
    order = KeyedOrder(64, recipe.seed)
    head = LinearHead(16, 6, recipe.seed)
    optimizer = Lars(head.parameters(), momentum=0.9)

    def features(pictures: list[Tensor]) -> Tensor:
        with torch.no_grad():
            tokens: Tensor = model.encoder.forward_features(context.normalise(torch.stack(pictures)))
        return tokens[:, 0]

    mean, var = torch.zeros(16), torch.ones(16)
    for step in range(8):
        epoch, place = divmod(step, 2)
        positions = [64 * epoch + 24 * place + i for i in range(24)]
        images = [order.index(g) for g in positions]
        x = features([view(train.open(i), g, recipe.size) for i, g in zip(images, positions, strict=True)])
        share = step / 8
        warm = 1 / 4
        shape = share / warm if share < warm else 0.5 * (1 + math.cos(math.pi * (share - warm) / (1 - warm)))
        for group in optimizer.param_groups:
            group["lr"] = 30 * 24 / 256 * shape
        momentum = max(0.1, 1 / (step + 1))
        mean = (1 - momentum) * mean + momentum * x.mean(0)
        var = (1 - momentum) * var + momentum * x.var(0)
        scaled = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-6).sqrt()
        loss = F.cross_entropy(head.linear(scaled), torch.tensor([train.label(i) for i in images]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    test = probe.images.evaluation
    x = features([context.view(test.open(i), i, recipe.size) for i in range(len(test))])
    labels = torch.tensor([test.label(i) for i in range(len(test))])
    with torch.no_grad():
        logits = head.linear((x - mean) / (var + 1e-6).sqrt())
    assert numbers["linear_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    best = logits.topk(5, dim=1).indices == labels[:, None]
    assert numbers["linear_top1"] == pytest.approx(100 * best[:, 0].float().mean().item())
    assert numbers["linear_top5"] == pytest.approx(100 * best.any(1).float().mean().item())


def test_it_beats_chance_and_leaves_a_net_with_batchnorm_as_it_was(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write_coloured(tmp_path)
    probe, model = build(tiny_recipe(*QUICK, "data=folder", f"data.root={tmp_path}"))
    numbers = leaves_everything_as_it_was(probe.run, model)
    # Three classes.
    assert numbers["linear_top1"] > 80
    assert "linear_top5" not in numbers


def test_workers_and_micro_batches_change_nothing(tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT))
    first = probe.run(model)
    with_workers(probe, 2)
    assert probe.run(model) == first
    other, _ = build(tiny_recipe(*SHORT, "probe.micro_batch_size=24"))
    assert other.run(model) == pytest.approx(first, rel=1e-4)


def stopping_at(step: int) -> Callable[[], object]:
    @contextmanager
    def stop_signal() -> Iterator[Callable[[], int]]:
        calls = iter(range(1, 1000))
        yield lambda: 15 if next(calls) == step else 0

    return stop_signal


def trained_head(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> nn.Module:
    kept: list[nn.Module] = []
    real = LinearProbe._evaluate

    def evaluate(self: LinearProbe, encoder: nn.Module, head: nn.Module) -> dict[str, float]:
        kept.append(head)
        return real(self, encoder, head)

    with monkeypatch.context() as patch:
        patch.setattr(LinearProbe, "_evaluate", evaluate)
        run()
    return kept[0]


def test_an_interrupted_probe_goes_on_bitwise_and_removes_its_state(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, model = build(tiny_recipe(*SHORT))
    expected = trained_head(monkeypatch, lambda: whole.run(model)).state_dict()
    for stop in (1, 4):
        probe, _ = build(tiny_recipe(*SHORT), folder=tmp_path, stop_signal=stopping_at(stop))
        with pytest.raises(Interrupted) as stopped:
            probe.run(model)
        step = sum((1, 4)[: (1, 4).index(stop) + 1])
        assert str(stopped.value) == f"stopped by SIGTERM after step {step}"
        (file,) = tmp_path.iterdir()
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"step": str(step)}
    said: list[str] = []
    probe, _ = build(tiny_recipe(*SHORT), folder=tmp_path, say=said.append)
    found = trained_head(monkeypatch, lambda: probe.run(model)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "resumes after step 5 of 8" in said[0]
    assert not list(tmp_path.iterdir())


def test_the_state_of_another_protocol_or_encoder_is_not_mixed_in(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    probe, model = build(tiny_recipe(*SHORT), folder=tmp_path, stop_signal=stopping_at(3))
    with pytest.raises(Interrupted):
        probe.run(model)
    (file,) = tmp_path.iterdir()
    names = set()
    for overrides in (["probe.base_lr=31"], ["seed=4"], ["data.mean=[0.5, 0.5, 0.4]"], ["data.seed=1"], []):
        other, same = build(tiny_recipe(*SHORT, *overrides), folder=tmp_path)
        if not overrides:
            same.encoder.norm.bias.data[0] += 1e-6
        names.add(other._state_file(same.encoder))
    assert len(names - {file}) == 5
    # What changes no result changes no name.
    neutral, same = build(tiny_recipe(*SHORT, "probe.micro_batch_size=5", "probe.save_minutes=1"),
                          folder=tmp_path)  # fmt: skip
    assert neutral._state_file(same.encoder) == file
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="damaged"):
        neutral.run(model)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["probe.warmup_epochs=90"], "warmup_epochs is 90"),
        (["probe.crop_scale=[0, 1]"], "crop_scale is"),
        (["data=folder", "data.root={tmp}", "data.labels=none"], "needs labels"),
        (["probe.num_train=1"], "at least 2 images"),
    ],
)
def test_mistakes_get_a_sentence(
    overrides: list[str], words: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write_coloured(tmp_path, 2, 2)
    with pytest.raises(UserError, match=words):
        build(tiny_recipe("probe=linear", *[text.replace("{tmp}", str(tmp_path)) for text in overrides]))


def test_a_loss_that_is_not_finite_is_told(tiny_recipe: Callable[..., Recipe]) -> None:
    probe, model = build(tiny_recipe(*SHORT))
    model.encoder.norm.bias.data[0] = math.nan
    with pytest.raises(UserError, match=r"lower probe\.base_lr"):
        probe.run(model)
