"""Draw the pictures of the documentation, from nothing but code and the results of the CIFAR-10 study.

    python tools/make_figures.py [--image PATH] [--out DIR]

Writes crop, stages, positions, targets, budget, randomness and worth (the README's) as PNG. All are twice as
fine as the width at which a page shows them (about 830 pixels), on white. The figures of whole studies are
drawn by `tools/study_report.py`.
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path

import numpy as np
import torch
from concept_figures import budget_figure, positions_figure, randomness_figure, targets_figure
from crop_figure import crop_figure
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import Tensor
from worth_figure import worth_figure

from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.curriculum.efficienttrain import Constant, EfficientTrain
from etpp_ssl.optim.optimizers import OptimConfig
from etpp_ssl.report.figures import stages_figure

SIZE = 224
BANDWIDTHS = (96, 160)
DPI = 200
RUN = {"num_images": 1_281_167, "batch_size": 4096, "budget_epochs": 400.0}
"""ImageNet-1K, as in the paper's masked-autoencoder runs."""


def main() -> None:
    """Parse, draw, save, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="a picture of your own instead of the synthetic one")
    default = Path(__file__).parents[1] / "docs" / "figures"
    parser.add_argument("--out", type=Path, default=default, help="folder (default: %(default)s)")
    options = parser.parse_args()

    image = woven_picture() if options.image is None else read_picture(options.image)
    options.out.mkdir(parents=True, exist_ok=True)
    save_small(crop_figure(image, BANDWIDTHS), options.out / "crop.png", num_colours=128)
    stages = stages_figure(published_curricula(), OptimConfig().learning_rates(RUN["batch_size"]))
    save_small(stages, options.out / "stages.png", num_colours=64)
    save_small(positions_figure(image), options.out / "positions.png", num_colours=128)
    save_small(targets_figure(image), options.out / "targets.png", num_colours=128)
    save_small(budget_figure(published_curricula()), options.out / "budget.png", num_colours=64)
    save_small(randomness_figure(), options.out / "randomness.png", num_colours=64)
    save_small(worth_figure(), options.out / "worth.png", num_colours=64)


def published_curricula() -> dict[str, Curriculum]:
    """Constant resolution and the three published tables, for the same compute."""
    return {
        "constant": Constant(image_size=(SIZE, SIZE), **RUN),
        "efficienttrain, general": EfficientTrain("general", image_size=SIZE, **RUN),
        "efficienttrain, deit": EfficientTrain("deit", image_size=SIZE, **RUN),
        "efficienttrain, convnext": EfficientTrain("convnext", image_size=SIZE, **RUN),
    }


def woven_picture() -> Tensor:
    """A disk of three weaves before clouds with a natural spectrum, (3, SIZE, SIZE) in [0, 1].

    From left to right the weaves have 24, 64 and 96 cycles per axis: the first is left by a crop to 96,
    the second by one to 160, the third by the full image alone.
    """
    frequency = torch.hypot(torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)[None])
    noise = torch.randn(4, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    waves = torch.fft.rfft2(noise) * frequency.clamp_min(1 / SIZE) ** -1.5
    clouds = torch.fft.irfft2(waves, s=(SIZE, SIZE))
    clouds = clouds / clouds.std((1, 2), keepdim=True)
    # One field of brightness for all channels, and a little colour of each channel's own.
    clouds = torch.tensor([0.38, 0.50, 0.58])[:, None, None] + 0.11 * clouds[:1] + 0.02 * clouds[1:]

    centre = torch.arange(SIZE) + 0.5 - SIZE / 2
    y, x = centre[:, None], centre[None]
    radius = 0.4 * SIZE
    strip = ((x + radius) / (2 * radius / 3)).floor().clamp(0, 2).long()
    cycles = torch.tensor([24, 64, 96])[strip]
    weave = torch.sin(2 * math.pi / SIZE * cycles * x) * torch.sin(2 * math.pi / SIZE * cycles * y)
    disk = torch.tensor([0.75, 0.62, 0.45])[:, None, None] * (1 + 0.4 * weave)
    covered = (radius - torch.hypot(y, x) + 0.5).clamp(0, 1)
    return (covered * disk + (1 - covered) * clouds).clamp(0, 1)


def read_picture(path: Path) -> Tensor:
    """The centre of a picture file, scaled to (3, SIZE, SIZE) in [0, 1]."""
    with Image.open(path) as picture:
        return as_tensor(ImageOps.fit(picture.convert("RGB"), (SIZE, SIZE), Image.Resampling.BICUBIC))


def as_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(picture) / np.float32(255)).permute(2, 0, 1)


def save_small(figure: Figure, path: Path, num_colours: int) -> None:
    """Write a PNG of a palette, several times smaller than true colour, and print its size."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(num_colours, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {picture.width}x{picture.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
