"""What `model.train` trains: exactly that gets gradients, and the rest behaves as in evaluation."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from classifier_families import FAMILIES
from pydantic import ValidationError
from torch import nn

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.cost import count_cost
from etpp_ssl.model.classifier import Classifier, ClassifierConfig
from etpp_ssl.optim.groups import parameter_groups
from etpp_ssl.randomness import ShapesOnly, freshly_initialised

SIZE = (64, 64)
VIT = FAMILIES["vit_of_explicit_dimensions"]
"""Three blocks."""


def make(train: str, settings: dict[str, Any] = VIT, **more: Any) -> Classifier:
    config = ClassifierConfig(**{"drop_path": 0.5, **settings, **more}, train=train)
    build = lambda: config.build(image_size=SIZE, in_chans=3, num_classes=3, seed=0)  # noqa: E731
    return freshly_initialised(0, build).train()


def names(model: Classifier) -> set[str]:
    return {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}


def step(model: Classifier) -> None:
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    model(images, torch.arange(4)).square().sum().backward()


TRAINED = {
    ("vit_of_explicit_dimensions", "head"): r"head\..+",
    ("vit_of_explicit_dimensions", "norms"): r"head\..+|fc_norm\..+|blocks\.\d\.norm[12]\..+",
    ("vit_of_explicit_dimensions", "last_2"): r"head\..+|fc_norm\..+|blocks\.[12]\..+",
    ("vit_of_explicit_dimensions", "lora"): r"head\..+|blocks\.\d\.attn\.(qkv|proj)\.lora_[ab]",
    ("resnet", "head"): r"fc\..+",
    ("resnet", "norms"): r"fc\..+|(.+\.)?bn\d\..+|layer\d\.0\.downsample\.1\..+",
    ("resnet", "last_2"): r"fc\..+|layer4\..+|layer3\.1\..+",
    ("convnext", "head"): r"head\.fc\..+",
    ("convnext", "last_1"): r"head\..+|stages\.3\..+",
    ("swin", "last_1"): r"head\..+|norm\..+|layers\.3\..+",
    ("swin", "norms"): r"head\..+|(.+\.)?norm\d?\..+",
    ("pvt", "last_1"): r"head\..+|norm\..+|block4\..+|(patch_embed4|pos_embed4|cls_token).*",
    ("cswin", "last_1"): r"head\..+|norm\..+|stage4\..+|merge3\..+",
    ("caformer", "head"): r"head\.fc\..+",
}


@pytest.mark.parametrize(("family", "train"), TRAINED)
def test_what_is_named_is_trained_and_the_rest_is_as_in_evaluation(family: str, train: str) -> None:
    model = make(train, FAMILIES[family])
    pattern = TRAINED[family, train]
    wanted = {name for name, _ in model.net.named_parameters() if re.fullmatch(pattern, name)}
    assert names(model) == wanted
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    step(model)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    for name, module in model.net.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        if own:
            assert module.training == bool(own & wanted or not name)
        if isinstance(module, nn.BatchNorm2d):
            mean = f"net.{name}.running_mean"
            assert torch.equal(module.running_mean, before[mean]) != module.training
    model.eval()
    assert not any(module.training for module in model.modules())


def test_all_trains_everything_in_training_mode() -> None:
    model = make("all", FAMILIES["resnet"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_frozen_backbone_draws_nothing_and_gives_the_features_of_evaluation() -> None:
    model = make("head", FAMILIES["resnet"])
    images = torch.randn(4, 3, *SIZE)
    logits = model(images)  # Without sample_ids, which drop-path would ask for.
    assert logits.requires_grad
    assert torch.equal(logits, model.eval()(images))
    with pytest.raises(UserError, match="drop-path is keyed by sample"):
        make("last_1", FAMILIES["resnet"])(images)


def test_layer_decay_counts_the_frozen_layers_and_groups_hold_the_trained() -> None:
    groups = parameter_groups(make("last_2").net, weight_decay=0.1, layer_decay=0.5)
    assert {group["layer"]: group["lr_scale"] for group in groups} == {2: 0.25, 3: 0.5, 4: 1.0}
    for train in ("head", "norms", "lora"):
        model = make(train)
        groups = parameter_groups(model.net, weight_decay=0.1, layer_decay=0.5)
        held = {id(parameter) for group in groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("train", ["norms", "lora", "last_1"])
def test_recomputed_blocks_give_the_same_gradients(train: str) -> None:
    plain, recomputed = make(train), make(train, grad_checkpointing=True)
    for model in (plain, recomputed):
        step(model)
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_no_operation_is_spent_on_what_is_frozen() -> None:
    def cost(train: str) -> Any:
        with ShapesOnly():
            model = make(train, drop_path=0.0)
        return count_cost(lambda: model(torch.zeros(1, 3, *SIZE, device="meta")).sum(), model)

    width, blocks, tokens, patch = 16, 3, 1 + 4 * 8, 3 * 16 * 8
    all_, head, norms, lora, last = map(cost, ("all", "head", "norms", "lora", "last_1"))
    # One forward pass, and the gradient of the head's weights.
    assert head.forward_flops == all_.forward_flops
    assert head.flops == head.forward_flops + 2 * width * 3
    # Without the gradients of linear layers of 12 width^2 weights in each block, and of the patch projection.
    weights = 2 * 12 * blocks * tokens * width**2 + 2 * (tokens - 1) * width * patch
    assert all_.flops - norms.flops == weights
    # An adapter of rank 8 takes three times its forward pass: qkv's and that of the projection. The first
    # layer's input needs no gradient.
    adapters = 2 * tokens * 8 * (width + 3 * width + width + width)
    assert lora.forward_flops - all_.forward_flops == blocks * adapters
    assert lora.flops < norms.flops + 3 * blocks * adapters
    assert head.flops < last.flops < norms.flops < all_.flops
    # Memory of the backward pass: nearly nothing, or one block of three.
    assert head.saved_values < 50
    assert head.saved_values < last.saved_values < all_.saved_values / 2
    assert norms.saved_values < lora.saved_values < all_.saved_values
    assert head.peak_values > 4 * tokens * width
    assert all_.peak_values >= all_.saved_values


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"train": "heads"}, "one of all, head, norms, lora and last_N .* such as last_4, not 'heads'"),
        ({"train": "last"}, "one of all, head, norms, lora and last_N"),
        ({"train": "last_0"}, "one of all, head, norms, lora and last_N"),
        ({"train": "head", "lora_rank": 4}, "lora_rank is 4, but train is head: it is for train=lora"),
        ({"lora_layers": "all"}, "lora_layers is all, but train is all"),
        ({"train": "lora", "lora_rank": 0}, "greater than or equal to 1"),
        ({"train": "lora", "lora_alpha": 0}, "greater than 0"),
        ({"train": "lora", "lora_layers": "mlp"}, "'attention' or 'all'"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        ClassifierConfig(**settings)


@pytest.mark.parametrize(
    ("train", "settings", "sentence"),
    [
        ("last_3", VIT, "model.train is last_3, but vit has 3 blocks: take fewer than these, or all"),
        (
            "last_1",
            {"name": "densenet121", "drop_path": 0.0},
            "model.train=last_1 needs a model whose layers are known: DenseNet is none of .*; all, head",
        ),
        ("norms", {"name": "vgg11", "drop_path": 0.0}, "train is norms, but vgg11 has none with scales"),
    ],
)
def test_parts_that_a_network_lacks_are_named(train: str, settings: dict[str, Any], sentence: str) -> None:
    with ShapesOnly(), pytest.raises(UserError, match=sentence):
        make(train, settings)
