"""What every reconstruction target promises; a new file in etpp_ssl/targets is found by itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

import etpp_ssl.targets
from etpp_ssl.curriculum.efficienttrain import EfficientTrain
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.recipe import AnyTarget

PATCH = (16, 16)
IMAGE_SIZE = (96, 160)
BANDWIDTHS = [
    stage.bandwidth
    for stage in EfficientTrain(
        "deit",
        image_size=IMAGE_SIZE,
        multiple=PATCH,
        num_images=100,
        batch_size=4,
        budget_epochs=1.0,
    ).stages
]


def component_configs(package: Any) -> list[type[BaseModel]]:
    """The Config classes of a package's modules that declare a literal `name`.

    One that inherits it is a part of a combined target.
    """
    found = []
    for module_info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            is_config = isinstance(member, type) and issubclass(member, BaseModel)
            if is_config and member.__module__ == module.__name__:
                field = member.model_fields.get("name")
                declared = field is not None and "name" in inspect.get_annotations(member)
                if declared and get_origin(field.annotation) is Literal:
                    found.append(member)
    return found


def variants(config: type[BaseModel]) -> list[BaseModel]:
    """The default settings, and each value of each field that is a switch or a choice of words."""
    settings = [config()]
    for key, field in config.model_fields.items():
        if key != "name" and get_origin(field.annotation) is Literal:
            settings += [config(**{key: value}) for value in get_args(field.annotation)]
        elif field.annotation is bool:
            settings.append(config(**{key: not field.default}))
    return settings


CONFIGS = component_configs(etpp_ssl.targets)

every_objective = pytest.mark.parametrize(
    "config", [pytest.param(v, id=repr(v)) for found in CONFIGS for v in variants(found)]
)
every_bandwidth = pytest.mark.parametrize("bandwidth", BANDWIDTHS)
every_channel_count = pytest.mark.parametrize("in_chans", [1, 3, 5])


def crop_and_mask(bandwidth: tuple[int, int], in_chans: int = 3, num: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, in_chans, *IMAGE_SIZE, generator=generator)
    num_patches = bandwidth[0] // PATCH[0] * (bandwidth[1] // PATCH[1])
    ids_keep = random_masking(torch.arange(num), num_patches, num_patches // 3, seed=0)
    return low_frequency_crop(images, bandwidth), removed_ids(ids_keep, num_patches)


def test_the_search_finds_the_known_objectives_and_no_name_twice() -> None:
    names = [config.model_fields["name"].default for config in CONFIGS]
    assert set(names) >= {"pixels", "hog", "combined"}
    assert len(names) == len(set(names))
    assert set(CONFIGS) == set(get_args(AnyTarget)), "a target that recipes do not know, or the reverse"


def test_the_bandwidths_are_those_of_a_rectangular_curriculum() -> None:
    assert len(BANDWIDTHS) > 2
    assert all(height != width for height, width in BANDWIDTHS)


@every_objective
@every_bandwidth
@every_channel_count
def test_the_target_is_float32_of_the_announced_shape_and_finite(
    config: Any, bandwidth: tuple[int, int], in_chans: int
) -> None:
    objective = config.build(patch_size=PATCH, in_chans=in_chans)
    images, ids_removed = crop_and_mask(bandwidth, in_chans)
    target = objective.target(images, ids_removed)
    assert target.shape == (*ids_removed.shape, objective.num_values)
    assert target.dtype == torch.float32
    assert target.isfinite().all()
    assert target.any()


@every_objective
@every_bandwidth
def test_only_the_prediction_gets_a_gradient(config: Any, bandwidth: tuple[int, int]) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(bandwidth)
    images.requires_grad_()
    assert not objective.target(images, ids_removed).requires_grad
    values = torch.randn(*ids_removed.shape, objective.num_values, requires_grad=True)
    loss = objective(values, ids_removed, images)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    loss.backward()
    assert images.grad is None
    assert values.grad is not None
    assert values.grad.isfinite().all()
    # Every masked patch of every image weighs in.
    assert (values.grad.abs().amax(dim=-1) > 0).all()


@every_objective
@every_bandwidth
def test_the_loss_is_the_mean_over_the_masked_patches_of_all_images(
    config: Any, bandwidth: tuple[int, int]
) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(bandwidth)
    values = torch.randn(*ids_removed.shape, objective.num_values)
    apart = [
        objective(values[i : i + 1, j : j + 1], ids_removed[i : i + 1, j : j + 1], images[i : i + 1])
        for i in range(ids_removed.shape[0])
        for j in range(ids_removed.shape[1])
    ]
    together = objective(values, ids_removed, images)
    torch.testing.assert_close(together, torch.stack(apart).mean(), rtol=1e-5, atol=1e-6)


@every_objective
@every_bandwidth
def test_a_perfect_prediction_has_the_least_loss(config: Any, bandwidth: tuple[int, int]) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(bandwidth)
    target = objective.target(images, ids_removed)
    best = objective(target, ids_removed, images)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    assert best < objective(target + 0.1 * noise, ids_removed, images)
    assert best < objective(torch.zeros_like(target), ids_removed, images)


@every_objective
def test_the_loss_comes_first_among_the_logged_ones_and_all_are_scalars(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(IMAGE_SIZE)
    values = torch.randn(*ids_removed.shape, objective.num_values)
    losses = objective.losses(values, ids_removed, images)
    assert next(iter(losses)) == "loss"
    assert all(name.startswith("loss") for name in losses)
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())
    assert torch.equal(losses["loss"], objective(values, ids_removed, images))


@every_objective
def test_images_that_are_not_finite_give_a_loss_that_is_not(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(IMAGE_SIZE)
    images[1] = torch.nan
    values = torch.zeros(*ids_removed.shape, objective.num_values)
    assert not objective(values, ids_removed, images).isfinite()


@every_objective
@every_bandwidth
def test_values_that_count_do_not_depend_on_pixels_that_do_not(
    config: Any, bandwidth: tuple[int, int]
) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(bandwidth)
    valid = torch.ones(3, 1, *bandwidth, dtype=torch.bool)
    target, counts = objective.target_with_gaps(images, ids_removed, valid)
    assert counts.dtype == torch.bool
    assert counts.all()
    torch.testing.assert_close(target, objective.target(images, ids_removed), rtol=0, atol=2e-5)
    valid[1, :, : bandwidth[0] // 2 + 3] = False
    target, counts = objective.target_with_gaps(images, ids_removed, valid)
    other = torch.where(valid, images, 9 * torch.randn(images.shape))
    assert target.shape == counts.shape == (*ids_removed.shape, objective.num_values)
    assert counts[[0, 2]].all()
    assert 0 < counts[1].float().mean() < 1
    again, counts_again = objective.target_with_gaps(other, ids_removed, valid)
    assert torch.equal(counts, counts_again)
    assert torch.equal(target[counts], again[counts])


@every_objective
def test_operations_can_be_counted_on_the_meta_device(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(IMAGE_SIZE)
    assert objective.target(images.to("meta"), ids_removed.to("meta")).shape[-1] == objective.num_values


@every_objective
def test_targets_follow_the_ids_and_each_image_has_its_own(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(IMAGE_SIZE)
    target = objective.target(images, ids_removed)
    backward = objective.target(images, ids_removed.flip(1))
    torch.testing.assert_close(backward.flip(1), target)
    for i in range(len(images)):
        alone = objective.target(images[i : i + 1], ids_removed[i : i + 1])
        torch.testing.assert_close(alone[0], target[i])
    assert not torch.equal(target[0], target[1])


@every_objective
def test_a_flat_image_has_a_finite_target_and_loss(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    _, ids_removed = crop_and_mask(IMAGE_SIZE)
    images = torch.full((3, 3, *IMAGE_SIZE), 0.25)
    target = objective.target(images, ids_removed)
    assert target.isfinite().all()
    assert objective(torch.zeros_like(target), ids_removed, images).isfinite()


@every_objective
def test_autocast_and_half_precision_predictions_still_give_a_float32_loss(config: Any) -> None:
    objective = config.build(patch_size=PATCH, in_chans=3)
    images, ids_removed = crop_and_mask(IMAGE_SIZE)
    plain = objective.target(images, ids_removed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = objective.target(images, ids_removed)
        loss = objective(torch.zeros_like(plain).bfloat16(), ids_removed, images)
    torch.testing.assert_close(target, plain)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(torch.zeros_like(plain), ids_removed, images))
