"""The loss on images with missing pixels against a definition in loops, pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data
from etpp_ssl.data.views import Normalise
from etpp_ssl.model.mask_patterns import UniformMaskingConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.model.patches import gather_patches, patchify
from etpp_ssl.targets.base import Objective
from etpp_ssl.targets.combined import CombinedConfig, HogPart, PixelsPart
from etpp_ssl.targets.hog import HogConfig, hog_features
from etpp_ssl.targets.pixels import PixelsConfig, normalise_patches

# Of images, channels, patches, and bandwidths.
CASES = [
    ((24, 40), 3, (4, 4), [(24, 40), (16, 24), (12, 20)]),
    ((27, 50), 2, (3, 5), [(27, 50), (15, 30), (27, 35)]),
    ((30, 22), 1, (6, 2), [(30, 22), (18, 10)]),
]
GEOMETRIES = [
    (size, chans, patch, bandwidth) for size, chans, patch, bandwidths in CASES for bandwidth in bandwidths
]
every_geometry = pytest.mark.parametrize(("size", "in_chans", "patch", "bandwidth"), GEOMETRIES)
TARGETS: dict[str, Any] = {
    "norm_pix": PixelsConfig(),
    "pixels": PixelsConfig(norm_pix=False),
    "hog": HogConfig(bins=5),
    "combined": CombinedConfig(parts=(PixelsPart(weight=0.5), HogPart(weight=2.0, bins=4))),
}
MIN_VALID = 0.4


def images_with_gaps(size: tuple[int, int], in_chans: int) -> Tensor:
    """Values of some sensor: a whole one, one with a wedge and single pixels missing, one with a band."""
    generator = torch.Generator().manual_seed(0)
    images = 300 + 100 * torch.randn(3, in_chans, *size, generator=generator)
    rows, columns = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    wedge = 2 * columns + 3 * rows < 1.1 * size[1]
    spots = torch.rand(size, generator=generator) < 0.004
    images[1, :, wedge | spots] = torch.nan
    # One channel is enough.
    images[2, in_chans - 1, :, size[1] - size[1] // 4 :] = torch.nan
    return images


def plain_lobe(out: int, size: int, bandwidth: int) -> list[float]:
    """Weights of the pixels of an axis around an output pixel: a triangle over the ring, of sum 1."""
    weights = []
    for n in range(size):
        ahead = (n - out * size / bandwidth) % size
        weights.append(max(0.0, 1 - min(ahead, size - ahead) * bandwidth / size))
    return [weight / sum(weights) for weight in weights]


def plain_valid(image: Tensor, bandwidth: tuple[int, int], patch: tuple[int, int]) -> list[list[bool]]:
    """Pixels of the crop that count, of an image (C, H, W)."""
    height, width = image.shape[1:]
    missing = image.isnan().any(dim=0).tolist()
    downs = [plain_lobe(y, height, bandwidth[0]) for y in range(bandwidth[0])]
    acrosses = [plain_lobe(x, width, bandwidth[1]) for x in range(bandwidth[1])]
    gaps = [(n, m) for n in range(height) for m in range(width) if missing[n][m]]
    valid = [[sum(down[n] * across[m] for n, m in gaps) < 0.001 for across in acrosses] for down in downs]
    for top in range(0, bandwidth[0], patch[0]):
        for left in range(0, bandwidth[1], patch[1]):
            inside = [(top + i, left + j) for i in range(patch[0]) for j in range(patch[1])]
            if sum(valid[y][x] for y, x in inside) < max(1, MIN_VALID * len(inside)):
                for y, x in inside:
                    valid[y][x] = False
    return valid


def plain_patch_errors(
    config: Any, crop: Tensor, valid: list[list[bool]], number: int, values: list[float], patch: Any
) -> list[float]:
    """Squared errors of the values of a patch that count."""
    in_chans, height, width = crop.shape
    p, q = patch
    top, left = number // (width // q) * p, number % (width // q) * q
    if config.name == "pixels":
        inside = [
            (c, top + i, left + j, values[(i * q + j) * in_chans + c])
            for i in range(p)
            for j in range(q)
            for c in range(in_chans)
            if valid[top + i][left + j]
        ]
        target = [float(crop[c, y, x]) for c, y, x, _ in inside]
        if config.norm_pix and target:
            mean = sum(target) / len(target)
            variance = sum((t - mean) ** 2 for t in target) / max(1, len(target) - 1)
            target = [(t - mean) / math.sqrt(variance + 1e-6) for t in target]
        return [(value - t) ** 2 for (*_, value), t in zip(inside, target, strict=True)]
    r, s = (side // 2 if side % 2 == 0 else side for side in patch)
    histograms = hog_features(crop[None], (r, s), config.bins)[0].tolist()
    errors, place = [], 0
    for i in range(top, top + p, r):
        for j in range(left, left + q, s):

            def counts(y: int, x: int) -> bool:
                y, x = abs(y), abs(x)
                return valid[min(y, 2 * height - 2 - y)][min(x, 2 * width - 2 - x)]

            whole = all(counts(y, x) for y in range(i - 1, i + r + 1) for x in range(j - 1, j + s + 1))
            for c in range(in_chans):
                for k in range(config.bins):
                    if whole:
                        errors.append((values[place] - histograms[c][k][i // r][j // s]) ** 2)
                    place += 1
    return errors


def plain_loss(
    config: Any, crops: Tensor, valid: list[Any], ids: Tensor, values: Tensor, patch: Any
) -> float:
    """Mean over a patch's values that count, over an image's patches that have some, over the images."""
    if config.name == "combined":
        lengths = [part.build(patch_size=patch, in_chans=crops.shape[1]).num_values for part in config.parts]
        shares = values.split(lengths, dim=-1)
        return sum(
            part.weight * plain_loss(part, crops, valid, ids, share, patch)
            for part, share in zip(config.parts, shares, strict=True)
        )
    of_images = []
    for b, crop in enumerate(crops):
        patches = [
            plain_patch_errors(config, crop, valid[b], number, values[b, m].tolist(), patch)
            for m, number in enumerate(ids[b].tolist())
        ]
        means = [sum(errors) / len(errors) for errors in patches if errors]
        of_images.append(sum(means) / max(1, len(means)))
    return sum(of_images) / len(of_images)


class Scene:
    """Images with gaps, as a model is shown them."""

    def __init__(
        self, size: tuple[int, int], in_chans: int, patch: tuple[int, int], bandwidth: tuple[int, int]
    ) -> None:
        self.raw = images_with_gaps(size, in_chans)
        normalise = Normalise((1.2,) * in_chans, (0.4,) * in_chans, torch.device("cpu"))
        self.crops = low_frequency_crop(normalise(self.raw), bandwidth)
        masker = Masker(UniformMaskingConfig(), 0.5, None, patch, 3, MIN_VALID)
        self.valid = masker.counted(pixels_with_data(self.raw, bandwidth))
        self.mask = masker(torch.arange(3), bandwidth, 0.0, self.valid)
        self.ids = self.mask.ids_predict

    def prediction(self, num_values: int) -> Tensor:
        return torch.randn(*self.ids.shape, num_values, generator=torch.Generator().manual_seed(1))


@every_geometry
def test_the_pixels_that_count_are_those_of_the_definition(
    size: tuple[int, int], in_chans: int, patch: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    scene = Scene(size, in_chans, patch, bandwidth)
    expected = torch.tensor([plain_valid(image, bandwidth, patch) for image in scene.raw])
    assert torch.equal(scene.valid[:, 0], expected)
    assert expected[0].all()
    assert 0.2 < expected[1:].float().mean() < 0.9


@every_geometry
@pytest.mark.parametrize("name", TARGETS)
def test_the_loss_is_that_of_the_definition(
    name: str, size: tuple[int, int], in_chans: int, patch: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    scene, config = Scene(size, in_chans, patch, bandwidth), TARGETS[name]
    objective = config.build(patch_size=patch, in_chans=in_chans)
    values = scene.prediction(objective.num_values)
    found = objective(values, scene.ids, scene.crops, scene.valid)
    valid = scene.valid[:, 0].tolist()
    expected = plain_loss(config, scene.crops, valid, scene.ids, values, patch)
    assert found.item() == pytest.approx(expected, rel=2e-5)
    # The gaps matter: all pixels together have another loss.
    assert abs(objective(values, scene.ids, scene.crops).item() / expected - 1) > 2e-4


@every_geometry
@pytest.mark.parametrize("name", TARGETS)
def test_what_lies_where_no_data_is_changes_neither_loss_nor_gradient(
    name: str, size: tuple[int, int], in_chans: int, patch: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    scene, config = Scene(size, in_chans, patch, bandwidth), TARGETS[name]
    objective = config.build(patch_size=patch, in_chans=in_chans)
    values = scene.prediction(objective.num_values).requires_grad_()
    found = objective(values, scene.ids, scene.crops, scene.valid)
    (gradient,) = torch.autograd.grad(found, values)
    noise = 50 * torch.randn(scene.crops.shape, generator=torch.Generator().manual_seed(2))
    other = torch.where(scene.valid, scene.crops, noise)
    _, counts = objective.target_with_gaps(scene.crops, scene.ids, scene.valid)
    with torch.no_grad():
        hidden = torch.where(counts, values, 7.0)
    hidden.requires_grad_()
    again = objective(hidden, scene.ids, other, scene.valid)
    assert torch.equal(found, again)
    assert torch.equal(gradient, torch.autograd.grad(again, hidden)[0])
    assert not gradient[~counts].any()


@every_geometry
@pytest.mark.parametrize("name", TARGETS)
def test_an_image_has_the_same_weight_in_any_batch(
    name: str, size: tuple[int, int], in_chans: int, patch: tuple[int, int], bandwidth: tuple[int, int]
) -> None:
    scene, config = Scene(size, in_chans, patch, bandwidth), TARGETS[name]
    objective = config.build(patch_size=patch, in_chans=in_chans)
    values = scene.prediction(objective.num_values)
    apart = [
        objective(values[i : i + 1], scene.ids[i : i + 1], scene.crops[i : i + 1], scene.valid[i : i + 1])
        for i in range(3)
    ]
    together = objective(values, scene.ids, scene.crops, scene.valid)
    torch.testing.assert_close(together, torch.stack(apart).mean(), rtol=1e-6, atol=0)
    # A whole image counts as it does where nobody asks for gaps.
    plain = objective(values[:1], scene.ids[:1], scene.crops[:1])
    torch.testing.assert_close(apart[0], plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", TARGETS)
def test_an_image_of_which_nothing_counts_adds_zero(name: str) -> None:
    scene = Scene((24, 40), 3, (4, 4), (16, 24))
    objective = TARGETS[name].build(patch_size=(4, 4), in_chans=3)
    values = scene.prediction(objective.num_values).requires_grad_()
    valid = scene.valid.clone()
    valid[1] = False
    loss = objective(values, scene.ids, scene.crops, valid)
    (gradient,) = torch.autograd.grad(loss, values)
    assert not gradient[1].any()
    rest = [0, 2]
    two = objective(values[rest], scene.ids[rest], scene.crops[rest], valid[rest])
    torch.testing.assert_close(loss, two * 2 / 3)


def test_a_target_that_says_nothing_of_gaps_counts_whole_patches_alone() -> None:
    class Brightness(Objective):
        def __init__(self) -> None:
            self.patch_size, self.num_values = (4, 4), 16

        def target(self, images: Tensor, ids_removed: Tensor) -> Tensor:
            return gather_patches(patchify(images.mean(1, keepdim=True), self.patch_size), ids_removed)

    scene, objective = Scene((24, 40), 3, (4, 4), (16, 24)), Brightness()
    values = scene.prediction(16)
    errors = (values - objective.target(scene.crops, scene.ids)).square().mean(dim=-1)
    whole = gather_patches(patchify(scene.valid, (4, 4)), scene.ids).all(dim=-1)
    assert 0 < whole[1:].float().mean() < 1
    expected = sum(errors[b][whole[b]].mean() for b in range(3)) / 3
    torch.testing.assert_close(objective(values, scene.ids, scene.crops, scene.valid), expected)


def test_a_patch_of_one_value_that_counts_is_finite() -> None:
    patches = torch.tensor([[[5.0, 2.0, 9.0], [5.0, 2.0, 9.0]]])
    counts = torch.tensor([[[False, True, False], [False, False, False]]])
    normed = normalise_patches(patches, counts)
    assert normed.isfinite().all()
    assert normed[0, 0, 1] == 0
