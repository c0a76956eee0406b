"""The HOG target against a plain loop over cells and pixels."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.efficienttrain import ConstantConfig, EfficientTrainConfig
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.model.masking import random_masking, removed_ids
from etpp_ssl.targets.hog import HogConfig, hog_features

# size, cell, channels, bins
CASES = [
    ((16, 24), (8, 8), 3, 9),
    ((14, 28), (7, 7), 1, 9),
    ((6, 10), (2, 2), 2, 9),
    ((9, 20), (3, 4), 1, 8),
    ((15, 6), (5, 2), 2, 2),
    ((2, 3), (1, 1), 1, 5),
]


def random_images(size: tuple[int, int], in_chans: int, num: int = 2) -> Tensor:
    return torch.randn(num, in_chans, *size, generator=torch.Generator().manual_seed(0))


def plain_hog(images: Tensor, cell: tuple[int, int], bins: int) -> Tensor:
    """The definition, one pixel after the other in float64."""
    num, in_chans, height, width = images.shape
    histograms = torch.zeros(num, in_chans, bins, height // cell[0], width // cell[1], dtype=torch.float64)
    for n in range(num):
        for c in range(in_chans):
            image = images[n, c].tolist()

            def pixel(y: int, x: int, image: list[list[float]] = image) -> float:
                # Reflection without repeating the edge: -1 is 1, and H is H - 2.
                y, x = abs(y), abs(x)
                return image[min(y, 2 * height - 2 - y)][min(x, 2 * width - 2 - x)]

            for y in range(height):
                for x in range(width):
                    gx = sum(w * (pixel(y + d, x - 1) - pixel(y + d, x + 1)) for d, w in SMOOTHING)
                    gy = sum(w * (pixel(y - 1, x + d) - pixel(y + 1, x + d)) for d, w in SMOOTHING)
                    k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                    histograms[n, c, k, y // cell[0], x // cell[1]] += math.hypot(gx, gy)
    norms = histograms.square().sum(2, keepdim=True).sqrt()
    return torch.where(norms > 0, histograms / norms, 0.0)


SMOOTHING = [(-1, 1), (0, 2), (1, 1)]


@pytest.mark.parametrize(("size", "cell", "in_chans", "bins"), CASES)
def test_features_equal_the_plain_loop(
    size: tuple[int, int], cell: tuple[int, int], in_chans: int, bins: int
) -> None:
    images = random_images(size, in_chans)
    features = hog_features(images, cell, bins)
    expected = plain_hog(images, cell, bins)
    assert features.dtype == torch.float32
    assert features.shape == expected.shape
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
    if cell[0] == cell[1]:
        assert torch.equal(hog_features(images, cell[0], bins), features)


def test_a_crop_of_a_real_size_equals_the_dense_histogram() -> None:
    images = low_frequency_crop(random_images((64, 96), 3), (32, 48))
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).expand(3, 1, 3, 3)
    gx, gy = F.conv2d(padded, kernel, groups=3), F.conv2d(padded, kernel.mT, groups=3)
    k = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
    dense = F.one_hot(k, 9) * torch.hypot(gx, gy)[..., None]
    cells = dense.unflatten(3, (6, 8)).unflatten(2, (4, 8)).sum((3, 5))
    expected = F.normalize(cells, dim=-1).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(hog_features(images, 8), expected, rtol=0, atol=1e-5)


# Rows of the image, and the bin where all of the gradient must be; (gx, gy) lies on the border of two
# bins in the first four, where the reference decides for the upper one and takes pi for 0.
EDGES = {
    "bright below: (0, -)": ([[0, 0], [0, 0], [1, 1], [1, 1]], 0),
    "bright above: (0, +)": ([[1, 1], [1, 1], [0, 0], [0, 0]], 0),
    "bright left: (+, 0)": ([[1, 1, 0, 0]] * 2, 4),
    "bright right: (-, 0)": ([[0, 0, 1, 1]] * 2, 4),
}


@pytest.mark.parametrize("negative_zero", [False, True])
@pytest.mark.parametrize("rows", EDGES)
def test_an_edge_along_an_axis_falls_into_one_bin(rows: str, negative_zero: bool) -> None:
    values, expected = EDGES[rows]
    image = torch.tensor(values, dtype=torch.float32)[None, None]
    # 0.1 and 0.7 are no sums of powers of two: rounding must not turn an exact zero into a direction.
    image = 0.1 + 0.7 * image if not negative_zero else -image
    features = hog_features(image, (image.shape[2], image.shape[3]), 9)[0, 0, :, 0, 0]
    assert features.nonzero().flatten().tolist() == [expected]
    assert features[expected].item() == pytest.approx(1)


@pytest.mark.parametrize("degrees", range(5, 180, 10))
def test_a_ramp_falls_into_the_bin_of_its_direction(degrees: int) -> None:
    """The angle runs from the y axis, as atan2(gx, gy) has it, and has no sign."""
    angle = math.radians(degrees)
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    ramp = math.sin(angle) * x + math.cos(angle) * y
    for image in (ramp, -ramp):
        inner = hog_features(image[None, None], 4)[0, 0, :, 1, 1]
        assert inner.argmax().item() == degrees // 20
        assert inner.max().item() == pytest.approx(1)


def test_flat_cells_give_zeros_and_the_others_norm_one() -> None:
    images = random_images((24, 32), 3)
    # A cell sees one pixel beyond itself.
    images[0, 1, :, :17] = 0.3
    features = hog_features(images, 8)
    assert not features[0, 1, :, :, :2].any()
    norms = features.norm(dim=2)
    norms[0, 1, :, :2] += 1
    torch.testing.assert_close(norms, torch.ones(2, 3, 3, 4))


def test_brightness_contrast_and_sign_change_nothing() -> None:
    images = random_images((16, 24), 3)
    torch.testing.assert_close(hog_features(-5 * images + 2, 8), hog_features(images, 8), rtol=0, atol=1e-4)


def test_channels_do_not_mix() -> None:
    images = random_images((16, 24), 5)
    apart = torch.cat([hog_features(images[:, c : c + 1], 8) for c in range(5)], dim=1)
    assert torch.equal(hog_features(images, 8), apart)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_precision_gives_float32_without_gradient_also_inside_autocast(dtype: torch.dtype) -> None:
    images = random_images((16, 24), 3).to(dtype).requires_grad_()
    plain = hog_features(images.detach().float(), 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hog_features(images, 8)
    assert inside.dtype == torch.float32
    assert not inside.requires_grad
    assert torch.equal(inside, plain)


def masked(size: tuple[int, int], patch: tuple[int, int], share: float) -> Tensor:
    num_patches = size[0] // patch[0] * (size[1] // patch[1])
    num_keep = round(num_patches * (1 - share))
    return removed_ids(random_masking(torch.arange(2), num_patches, num_keep, seed=0), num_patches)


@pytest.mark.parametrize("share", [0.25, 0.75, 0.9])
@pytest.mark.parametrize(
    ("size", "patch", "cell"),
    [
        ((48, 80), (16, 16), None),
        ((42, 28), (14, 14), None),
        ((12, 20), (4, 4), None),
        ((12, 20), (2, 4), 1),
        ((15, 24), (5, 8), [5, 2]),
    ],
)
def test_the_target_is_that_of_the_whole_image_at_the_masked_patches(
    size: tuple[int, int], patch: tuple[int, int], cell: object, share: float
) -> None:
    objective = HogConfig(cell=cell).build(patch_size=patch, in_chans=3)
    images, ids_removed = random_images(size, 3), masked(size, patch, share)
    features = hog_features(images, objective.cell)
    rows, columns = objective.cells_per_patch
    grid_columns = size[1] // patch[1]
    target = objective.target(images, ids_removed)
    assert target.shape == (*ids_removed.shape, objective.num_values)
    for n in range(2):
        for m, number in enumerate(ids_removed[n].tolist()):
            top, left = number // grid_columns * rows, number % grid_columns * columns
            cells = features[n, :, :, top : top + rows, left : left + columns]
            # Cell row, cell column, channel, bin.
            expected = cells.permute(2, 3, 0, 1).flatten()
            torch.testing.assert_close(target[n, m], expected, rtol=0, atol=1e-6)


def test_the_default_cell_halves_the_patch() -> None:
    cells = {
        (16, 16): (8, 8),
        (14, 14): (7, 7),
        (4, 4): (2, 2),
        (32, 16): (16, 8),
        (14, 7): (7, 7),
    }
    for patch, cell in cells.items():
        assert HogConfig().build(patch_size=patch, in_chans=3).cell == cell
    assert HogConfig().build(patch_size=(16, 16), in_chans=3).num_values == 2 * 2 * 9 * 3
    assert HogConfig(cell=4, bins=6).build(patch_size=(16, 8), in_chans=2).num_values == 4 * 2 * 6 * 2


@pytest.mark.parametrize("patch", [4, 14, 16])
@pytest.mark.parametrize("size", [224, 218, (96, 160)])
@pytest.mark.parametrize(
    "config",
    [ConstantConfig(), *(EfficientTrainConfig(table=t) for t in ("general", "deit", "convnext"))],
    ids=lambda config: getattr(config, "table", config.name),
)
def test_the_cell_divides_every_bandwidth_of_every_curriculum(
    config: EfficientTrainConfig, size: int | tuple[int, int], patch: int
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    objective = HogConfig().build(patch_size=(patch, patch), in_chans=1)
    curriculum = config.build(
        image_size=(height - height % patch, width - width % patch),
        multiple=(patch, patch),
        num_images=100,
        batch_size=10,
        budget_epochs=10,
    )
    for stage in curriculum.stages:
        features = hog_features(random_images(stage.bandwidth, 1, num=1), objective.cell)
        grid = [pixels // patch for pixels in stage.bandwidth]
        cells = [n * per_patch for n, per_patch in zip(grid, objective.cells_per_patch, strict=True)]
        assert list(features.shape[-2:]) == cells


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HogConfig(cell=5).build(patch_size=(16, 16), in_chans=3), ["cell 5", "1, 2, 4, 8, 16"]),
        (
            lambda: HogConfig(cell=(8, 3)).build(patch_size=(16, 14), in_chans=3),
            ["cell 8x3", "16x14", "1, 2, 7, 14 (width)"],
        ),
        (lambda: HogConfig(cell=0).build(patch_size=(4, 4), in_chans=3), ["cell 0", "1, 2, 4"]),
        (lambda: hog_features(torch.zeros(1, 1, 16, 24), 5), ["cell 5", "16x24", "(height)"]),
        (lambda: hog_features(torch.zeros(1, 1, 16, 24), 8, 1), ["bins is 1", "2 or more"]),
        (lambda: hog_features(torch.zeros(1, 1, 1, 24), 1), ["at least 2x2", "1x24"]),
        (lambda: hog_features(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), 8), ["uint8"]),
    ],
)
def test_a_mistake_is_one_sentence(call: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_real_photograph_equals_the_plain_loop(real_images: Path) -> None:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    file = min(real_images.glob("imagenette/val/*/*.JPEG"))
    # Whole numbers, so that float32 and float64 decide alike where a gradient lies along an axis.
    image = pil_to_tensor(Image.open(file).convert("RGB").resize((40, 32)))[None].float()
    features, expected = hog_features(image, 8), plain_hog(image, (8, 8), 9)
    torch.testing.assert_close(features.double(), expected, rtol=0, atol=1e-5)
