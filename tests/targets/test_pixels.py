"""The pixel target against a plain loop over masked patches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.targets.pixels import PixelsConfig

CASES = [((12, 20), (4, 4), 3), ((9, 25), (3, 5), 1), ((14, 28), (14, 7), 5)]


def masked_batch(size: tuple[int, int], patch: tuple[int, int], in_chans: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(2, in_chans, *size, generator=generator) - 1
    num_patches = size[0] // patch[0] * (size[1] // patch[1])
    ids_keep = random_masking(torch.arange(2), num_patches, max(1, num_patches // 4), seed=0)
    return images, removed_ids(ids_keep, num_patches)


def plain_target(images: Tensor, ids_removed: Tensor, patch: tuple[int, int], norm_pix: bool) -> Tensor:
    """One patch after the other, in float64: values by row, column, channel; variance unbiased."""
    p, q = patch
    columns = images.shape[3] // q
    rows = []
    for image, ids in zip(images.double(), ids_removed.tolist(), strict=True):
        for number in ids:
            top, left = number // columns * p, number % columns * q
            values = image[:, top : top + p, left : left + q].permute(1, 2, 0).flatten()
            if norm_pix:
                centred = values - values.sum() / len(values)
                variance = (centred**2).sum() / (len(values) - 1)
                values = centred / (variance + 1e-6) ** 0.5
            rows.append(values)
    return torch.stack(rows).unflatten(0, ids_removed.shape)


@pytest.mark.parametrize(("size", "patch", "in_chans"), CASES)
@pytest.mark.parametrize("norm_pix", [True, False])
def test_target_and_loss_equal_the_plain_loop(
    size: tuple[int, int], patch: tuple[int, int], in_chans: int, norm_pix: bool
) -> None:
    objective = PixelsConfig(norm_pix=norm_pix).build(patch_size=patch, in_chans=in_chans)
    images, ids_removed = masked_batch(size, patch, in_chans)
    expected = plain_target(images, ids_removed, patch, norm_pix)
    target = objective.target(images, ids_removed)
    assert objective.num_values == target.shape[-1] == patch[0] * patch[1] * in_chans
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=1e-5)

    prediction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    per_patch = ((prediction.double() - expected) ** 2).sum(-1) / expected.shape[-1]
    loss = objective(prediction, ids_removed, images)
    torch.testing.assert_close(loss.double(), per_patch.sum() / per_patch.numel(), rtol=1e-6, atol=0)


def test_a_perfect_prediction_costs_nothing_and_a_constant_error_its_square() -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    images, ids_removed = masked_batch((12, 20), (4, 4), 3)
    target = objective.target(images, ids_removed)
    assert objective(target, ids_removed, images).item() == 0
    assert objective(target + 0.5, ids_removed, images).item() == pytest.approx(0.25)


def test_normalised_patches_have_mean_zero_and_unbiased_variance_one() -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    target = objective.target(*masked_batch((12, 20), (4, 4), 3))
    torch.testing.assert_close(target.mean(-1), torch.zeros(target.shape[:2]), rtol=0, atol=1e-6)
    torch.testing.assert_close(target.var(-1), torch.ones(target.shape[:2]), rtol=0, atol=1e-4)


def test_brightness_and_contrast_of_a_patch_do_not_change_its_normalised_target() -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    images, ids_removed = masked_batch((12, 20), (4, 4), 3)
    changed = objective.target(5 * images + 2, ids_removed)
    torch.testing.assert_close(changed, objective.target(images, ids_removed), rtol=0, atol=1e-4)


def test_a_flat_patch_gives_a_target_of_zeros() -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    _, ids_removed = masked_batch((12, 20), (4, 4), 3)
    target = objective.target(torch.full((2, 3, 12, 20), 0.7), ids_removed)
    torch.testing.assert_close(target, torch.zeros_like(target), rtol=0, atol=1e-3)


def test_the_gradient_is_that_of_a_mean_over_all_masked_values() -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    images, ids_removed = masked_batch((12, 20), (4, 4), 3)
    target = objective.target(images, ids_removed)
    prediction = torch.randn_like(target).requires_grad_()
    objective(prediction, ids_removed, images).backward()
    expected = 2 * (prediction.detach() - target) / target.numel()
    torch.testing.assert_close(prediction.grad, expected)


def test_half_precision_predictions_are_compared_in_float32() -> None:
    objective = PixelsConfig(norm_pix=False).build(patch_size=(4, 4), in_chans=3)
    images, ids_removed = masked_batch((12, 20), (4, 4), 3)
    prediction = objective.target(images, ids_removed).bfloat16()
    loss = objective(prediction, ids_removed, images)
    assert loss.dtype == torch.float32
    expected = (prediction.double() - plain_target(images, ids_removed, (4, 4), False)) ** 2
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_of_any_precision_give_a_float32_target(dtype: torch.dtype) -> None:
    objective = PixelsConfig().build(patch_size=(4, 4), in_chans=3)
    images, ids_removed = masked_batch((12, 20), (4, 4), 3)
    images = images.to(dtype)
    target = objective.target(images, ids_removed)
    assert target.dtype == torch.float32
    expected = plain_target(images, ids_removed, (4, 4), True)
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=1e-5)


def test_one_value_has_no_deviation_to_divide_by() -> None:
    with pytest.raises(UserError, match="a patch of one pixel and channel has none; use norm_pix: false"):
        PixelsConfig().build(patch_size=(1, 1), in_chans=1)
    images, ids = masked_batch((3, 5), (1, 1), 1)
    target = PixelsConfig(norm_pix=False).build(patch_size=(1, 1), in_chans=1).target(images, ids)
    assert torch.equal(target[:, :, 0], images.flatten(1).gather(1, ids))
