"""Looking through a checkpoint: images, masks and predictions as panels, and as PNG files.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from etpp_ssl.config import UserError, show_size
from etpp_ssl.curriculum.cost import area_share
from etpp_ssl.files import replaced_file
from etpp_ssl.recipe import Recipe
from etpp_ssl.report.channels import ChannelView
from etpp_ssl.report.grid import enlargement, grid_figure, save_grid
from etpp_ssl.report.pictures import Crops, Picture, pictures_of_files, pictures_of_run
from etpp_ssl.report.reconstruction import Reconstruction, check_bandwidth, reconstruct
from etpp_ssl.report.targets import Panel, missing_picture, target_panels
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.weights.loading import load_trained


class Shown(NamedTuple):
    """Everything there is to see of one image."""

    crops: list[Panel]
    """The low-frequency crop at every bandwidth of the curriculum; last the image."""
    masked: Panel
    predictions: list[Panel]
    """The one that shows it best first; empty where the target cannot be drawn."""
    reconstruction: Reconstruction


class Viewer:
    """A run's model on the CPU, with whatever its images need to be shown.

    Args:
        recipe: the run's.
        seed: of the masks; None takes the recipe's, and so the masks of the reconstruction probe.
    """

    def __init__(self, recipe: Recipe, seed: int | None = None) -> None:
        self.recipe = recipe
        self.seed = recipe.seed if seed is None else seed
        self.crops = Crops(recipe)
        self.view = ChannelView(*recipe.data.statistics(recipe.in_chans))
        self.objective = recipe.build_objective()
        with torch.random.fork_rng(devices=[]):
            self.model = recipe.build_model().eval()
        # The steps depend on the number of images, the bandwidths do not.
        self.bandwidths = [stage.bandwidth for stage in recipe.build_curriculum(1).stages]

    def load(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's weights.

        Raises:
            UserError: if it is of another model, or gone: a run in progress removes old ones.
        """
        load_trained(self.model, checkpoint)

    def look(self, picture: Picture, bandwidth: tuple[int, int] | None = None) -> Shown:
        """Show an image to the model, masked, at a bandwidth; None is the full image.

        Raises:
            UserError: for a bandwidth that does not serve, or leaves no visible or no masked patch.
        """
        recipe = self.recipe
        bandwidth = bandwidth or recipe.size
        check_bandwidth(bandwidth, recipe.size, recipe.patch_size)
        images = self.crops(picture, bandwidth)
        shown = reconstruct(self.model, self.objective, images, self._visible(picture.number, bandwidth))
        removed = shown.grid[0] * shown.grid[1] - shown.ids_keep.shape[1]
        note = f"{removed} of {shown.grid[0] * shown.grid[1]} patches removed"
        at = "" if bandwidth == recipe.size else f", bandwidth {show_size(bandwidth)}"
        return Shown(
            self.crops_of(picture),
            Panel(f"masked input{at}", note, self.view(shown.visible())),
            target_panels(recipe.target, shown, self.view),
            shown,
        )

    def _visible(self, number: int, bandwidth: tuple[int, int]) -> Tensor:
        """Ids of the visible patches, as the reconstruction probe draws them for image `number`."""
        masker = self.recipe.model.masker(patch_size=self.recipe.patch_size, seed=self.seed)
        return masker.everything(torch.tensor([number]), bandwidth).ids_keep

    def crops_of(self, picture: Picture) -> list[Panel]:
        """The image at every bandwidth of the curriculum; last the image itself."""
        full = self.recipe.size
        panels = []
        for bandwidth in dict.fromkeys([*self.bandwidths, full]):
            whole = bandwidth == full
            share = area_share(bandwidth, full)
            panels.append(
                Panel(
                    f"image, {show_size(full)}" if whole else f"bandwidth {show_size(bandwidth)}",
                    "all frequencies" if whole else f"{share:.0%} of the pixels",
                    self.view(self.crops(picture, bandwidth)[0]),
                )
            )
        return panels


def write_grids(
    run_dir: str | Path,
    images: Sequence[str | Path] = (),
    *,
    out: str | Path | None = None,
    seed: int | None = None,
    bandwidth: tuple[int, int] | None = None,
    step: int | None = None,
    count: int = 8,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """One PNG per image: its crops, the masked input, and the prediction in every honest and other way.

    Args:
        run_dir: a run with a checkpoint.
        images: files and folders; none takes a keyed draw of the run's evaluation images, or of its
            training images where there are no others.
        out: folder of the PNGs; by default `RUN/report/reconstruction`.
        seed: of the masks; by default the run's.
        bandwidth: (height, width) of the masked input in pixels; by default the full image.
        step: of the checkpoint; by default the newest.
        count: images taken of each folder, or of the run's data.
        say: told of damaged checkpoints, of the data used and of targets without a picture.

    Returns:
        The files, in the order of the images.

    Raises:
        UserError: for a folder that is no run, a checkpoint, image or bandwidth that does not serve, or
            a folder that cannot be written to.
    """
    run = RunFolder(run_dir)
    recipe = run.recipe()
    checkpoint = choose_checkpoint(run, step, say)
    if bandwidth is not None:
        check_bandwidth(bandwidth, recipe.size, recipe.patch_size)
    if images:
        pictures = pictures_of_files([Path(image) for image in images], recipe, count)
    else:
        pictures, split = pictures_of_run(recipe, count)
        say(f"{len(pictures)} images of the {split} data")
    viewer = Viewer(recipe, seed)
    viewer.load(checkpoint)
    reason = missing_picture(recipe.target)
    if reason is not None:
        say(reason)
    folder = Path(out) if out is not None else run.path / "report" / "reconstruction"
    title = f"{run.path.absolute().name}, step {checkpoint.step:,}"
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            shown = viewer.look(picture, bandwidth)
            rows = [shown.crops, [shown.masked, *shown.predictions]]
            heading = _heading(viewer, picture, shown, title)
            written.append(folder / _file_name(picture, checkpoint.step, bandwidth))
            with replaced_file(written[-1]) as aside:
                save_grid(grid_figure(rows, heading, enlargement(recipe.size)), aside)
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written to: {error.strerror or error}") from error
    return written


def choose_checkpoint(run: RunFolder, step: int | None, say: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of a step, or the newest whole one for None.

    Raises:
        UserError: if there is none, it is damaged, or the run has none of that step.
    """
    if step is None:
        return run.trained(say)
    there = run.checkpoints()
    for checkpoint in there:
        if checkpoint.step == step:
            fault = checkpoint.fault()
            if fault is not None:
                raise UserError(f"checkpoint {str(checkpoint.path)!r} is damaged: {fault}")
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in reversed(there))
    raise UserError(
        f"run {str(run.path)!r} has no checkpoint of step {step}; "
        + (f"there are {steps}" if steps else "it has none yet")
    )


def _heading(viewer: Viewer, picture: Picture, shown: Shown, run: str) -> str:
    recipe = viewer.recipe
    parts = [
        f"{run}: {picture.name}",
        f"mask seed {viewer.seed}",
        f"loss on this image {shown.reconstruction.loss:.4g}",
        viewer.view.caption,
        missing_picture(recipe.target) or "",
    ]
    return "; ".join(part for part in parts if part)


def _file_name(picture: Picture, step: int, bandwidth: tuple[int, int] | None) -> str:
    stem = re.sub(r"[^\w.-]+", "-", Path(picture.name).stem, flags=re.ASCII)[:40]
    at = "" if bandwidth is None else f"_at-{show_size(bandwidth)}"
    return f"step-{step:08d}{at}_{picture.number:06d}_{stem}.png"
