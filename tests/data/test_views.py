"""Views: torchvision's distribution, keyed draws, plain Pillow pixels, and timm's evaluation view."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize

from etpp_ssl.data.formats.base import Channels
from etpp_ssl.data.formats.pictures import DecodedPicture
from etpp_ssl.data.views import EvalView, Normalise, TrainView, random_crop_box, to_tensor
from etpp_ssl.randomness import keyed_random

RATIO = (3 / 4, 4 / 3)


def noise(size: tuple[int, int], channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 (H, W, C); `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)


def channels_of(array: np.ndarray) -> Channels:
    if array.shape[2] == 3:
        return (Image.fromarray(array),)
    return tuple(Image.fromarray(array[:, :, c]) for c in range(array.shape[2]))


def picture_of(array: np.ndarray) -> DecodedPicture:
    return DecodedPicture(channels_of(array))


def torchvision_box(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int, int, int]:
    # get_params reads nothing of a tensor but its size, and `expand` makes one without pixels.
    image = torch.zeros(1).expand(1, size[1], size[0])
    top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(RATIO))
    return left, top, left + width, top + height


Quantity = Callable[[np.ndarray], np.ndarray]
QUANTITIES: dict[str, Quantity] = {
    "area": lambda box: (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]),
    "aspect": lambda box: (box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1]),
    "left": lambda box: box[:, 0],
    "top": lambda box: box[:, 1],
    "right": lambda box: box[:, 2],
    "bottom": lambda box: box[:, 3],
    "left with top": lambda box: box[:, 0] * box[:, 1],
    "left with width": lambda box: box[:, 0] * (box[:, 2] - box[:, 0]),
}


def largest_gap(left: np.ndarray, right: np.ndarray) -> float:
    """The two-sample Kolmogorov-Smirnov statistic."""
    points = np.union1d(left, right)
    shares = [
        np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (left, right)
    ]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(
    ("size", "scale"),
    [((97, 61), (0.2, 1.0)), ((48, 48), (0.08, 1.0)), ((37, 90), (0.5, 0.9)), ((9, 7), (0.2, 1.0))],
)
def test_crop_boxes_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    num_draws = 4000
    draw = random.Random(1)
    ours = np.array([random_crop_box(size, scale, draw) for _ in range(num_draws)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = np.array([torchvision_box(size, scale) for _ in range(num_draws)])
    # Samples of one distribution have a larger gap once in 10 000 times (Smirnov's bound).
    limit = math.sqrt(-math.log(1e-4 / 2) / 2) * math.sqrt(2 / num_draws)
    for name, quantity in QUANTITIES.items():
        left, right = quantity(ours), quantity(theirs)
        assert largest_gap(left, right) < limit, name
        error = math.sqrt((left.var() + right.var()) / num_draws)
        assert abs(left.mean() - right.mean()) <= 4 * error, name


@pytest.mark.parametrize("size", [(97, 61), (30, 300), (5, 5), (1, 1), (2, 1)])
def test_crop_boxes_lie_within_the_picture(size: tuple[int, int]) -> None:
    draw = random.Random(0)
    for _ in range(500):
        left, top, right, bottom = random_crop_box(size, (0.01, 1.0), draw)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


def test_the_fallback_is_torchvisions_at_every_size() -> None:
    # No box of four times the area fits, so both give up on drawing.
    sizes = [*itertools.product(range(1, 25), repeat=2), (300, 7), (7, 300), (640, 479), (480, 641)]
    for size in sizes:
        assert random_crop_box(size, (4.0, 4.0), random.Random(0)) == torchvision_box(size, (4.0, 4.0)), size


@pytest.mark.parametrize("size", [(400, 20), (11, 300)])
def test_extreme_aspect_falls_back_without_being_forced(size: tuple[int, int]) -> None:
    boxes = {random_crop_box(size, (0.9, 1.0), random.Random(i)) for i in range(20)}
    assert boxes == {torchvision_box(size, (0.9, 1.0))}


def train_view(**changes: object) -> TrainView:
    settings = {"crop_scale": (0.2, 1.0), "flip": True, "lanczos": False, "seed": 5}
    return TrainView((20, 28), **{**settings, **changes})  # type: ignore[arg-type]


FULL = (20, 28)


def test_a_view_is_a_function_of_seed_and_position() -> None:
    image, other = picture_of(noise((61, 47))), picture_of(noise((30, 90)))
    view = train_view()
    first = view(image, 7, FULL)
    for position in (0, 8, 7000):
        view(other, position, FULL)
    random.seed(99)
    assert torch.equal(view(image, 7, FULL), first)
    assert torch.equal(train_view()(image, 7, FULL), first)
    assert torch.equal(pickle.loads(pickle.dumps(view))(image, 7, FULL), first)
    assert not torch.equal(view(image, 8, FULL), first)
    assert not torch.equal(train_view(seed=6)(image, 7, FULL), first)


def test_views_leave_the_global_generators_alone() -> None:
    random.seed(3)
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    train_view()(picture_of(noise((61, 47))), 7, FULL)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(np.random.get_state()[1], before[2])


def plain_view(array: np.ndarray, position: int, *, mirror: bool) -> np.ndarray:
    """Crop, bicubic resize, mirror, channel by channel: float32 in, uint8 (H, W, C) out."""
    box = random_crop_box(array.shape[1::-1], (0.2, 1.0), keyed_random(5, "crop", position))
    planes = []
    for c in range(array.shape[2]):
        plane = Image.fromarray(array[:, :, c]).crop(box)
        planes.append(np.asarray(plane.resize(FULL[::-1], Image.Resampling.BICUBIC)))
    stacked = np.stack(planes, axis=2)
    return stacked[:, ::-1] if mirror else stacked


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(61, 47), (17, 90), (9, 9)])
def test_pixels_are_those_of_the_plain_crop_resize_and_mirror(size: tuple[int, int], channels: int) -> None:
    array = noise(size, channels)
    mirrored = []
    for position in range(30):
        found = train_view()(picture_of(array), position, FULL).permute(1, 2, 0).numpy()
        matches = [
            np.array_equal(found, plain_view(array, position, mirror=mirror)) for mirror in (False, True)
        ]
        assert sum(matches) == 1
        mirrored.append(matches[1])
        straight = train_view(flip=False)(picture_of(array), position, FULL)
        expected = plain_view(array, position, mirror=False)
        np.testing.assert_array_equal(straight.permute(1, 2, 0).numpy(), expected)
    assert 5 <= sum(mirrored) <= 25


def test_about_half_of_the_views_are_mirrored() -> None:
    # A ramp tells its direction in any crop.
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3, (50, 1))[:, :, None]
    num_views = 1000
    mirrored = 0
    for position in range(num_views):
        (values,) = train_view()(picture_of(ramp), position, FULL)
        mirrored += int(values[0, 0] > values[0, -1])
    assert abs(mirrored / num_views - 0.5) < 4 * 0.5 / math.sqrt(num_views)


@pytest.mark.parametrize("bandwidth", [(10, 14), (11, 21), (20, 14), (1, 2)])
@pytest.mark.parametrize("channels", [3, 5])
def test_lanczos_resizes_the_full_view_to_the_bandwidth(bandwidth: tuple[int, int], channels: int) -> None:
    image = picture_of(noise((61, 47), channels))
    full = train_view()(image, 3, bandwidth)
    assert full.shape == (channels, *FULL)
    small = train_view(lanczos=True)(image, 3, bandwidth)
    channels = channels_of(full.permute(1, 2, 0).numpy())
    resized = tuple(channel.resize(bandwidth[::-1], Image.Resampling.LANCZOS) for channel in channels)
    assert torch.equal(small, to_tensor(resized))


def test_lanczos_leaves_the_full_bandwidth_alone() -> None:
    image = picture_of(noise((61, 47)))
    assert torch.equal(train_view(lanczos=True)(image, 3, FULL), train_view()(image, 3, FULL))


TARGETS = [((32, 32), 0.875), ((21, 21), 0.9), ((20, 28), 0.875), ((33, 17), 0.95), ((24, 31), 1.0)]
SOURCES = [(61, 47), (47, 61), (40, 40), (32, 32), (200, 19), (19, 200), (8, 9), (1, 1), (97, 41)]


@pytest.mark.parametrize(("target", "crop_pct"), TARGETS)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_evaluation_view_is_timms_to_the_bit(target: tuple[int, int], crop_pct: float, channels: int) -> None:
    reference = transforms_imagenet_eval(target, crop_pct=crop_pct, interpolation="bicubic", normalize=False)
    view = EvalView(target, crop_pct)
    for size in SOURCES:
        image = channels_of(noise(size, channels))
        expected = torch.cat([reference(channel) for channel in image])
        found = view(DecodedPicture(image), 0, target)
        assert found.shape == (channels, *target)
        assert torch.equal(found, expected), size


@pytest.mark.parametrize(("target", "crop_pct"), [((32, 32), 0.875), ((20, 28), 0.875)])
def test_evaluation_view_is_torchvisions_resize_and_centre_crop(
    target: tuple[int, int], crop_pct: float
) -> None:
    """Bitwise where the resized size agrees; torchvision has no resize that covers a rectangle."""
    for size in SOURCES:
        covered = [math.floor(side / crop_pct) for side in target]
        scale = max(covered[0] / size[1], covered[1] / size[0])
        if target[0] == target[1]:
            resize = Resize(covered[0], InterpolationMode.BICUBIC)
        else:
            shape = [round(size[1] * scale), round(size[0] * scale)]
            resize = Resize(shape, InterpolationMode.BICUBIC)
        image = channels_of(noise(size))
        expected = CenterCrop(target)(resize(image[0]))
        found = EvalView(target, crop_pct)(DecodedPicture(image), 0, target)
        assert torch.equal(found, to_tensor((expected,))), size


def test_evaluation_view_depends_on_the_image_alone() -> None:
    image = picture_of(noise((61, 47)))
    view = EvalView((20, 28), 0.875)
    assert torch.equal(view(image, 0, (20, 28)), view(image, 9, (10, 14)))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_to_tensor_is_channels_first(channels: int) -> None:
    array = noise((9, 6), channels)
    tensor = to_tensor(channels_of(array))
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (channels, 6, 9)
    np.testing.assert_array_equal(tensor.numpy(), array.transpose(2, 0, 1))


def test_to_tensor_copies() -> None:
    image = channels_of(noise((9, 6)))
    before = image[0].tobytes()
    to_tensor(image).zero_()
    assert image[0].tobytes() == before


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.449,), (0.226,)),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5, 0.1, 0.9, 0.0, 0.3), (0.25, 0.5, 0.3, 1.0, 0.4)),
    ],
)
def test_normalise_is_the_formula(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    channels = len(mean)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, channels, 1, 1)
    # As the loader's batches may be: strides that are not those of (B, C, H, W).
    levels = levels.contiguous(memory_format=torch.channels_last)
    found = Normalise(mean, std, torch.device("cpu"))(levels)
    assert found.dtype == torch.float32
    m = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
    s = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
    expected = (levels.double() / 255 - m) / s
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
