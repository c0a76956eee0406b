"""Pre-train with the original's code: its model, its data pipeline, its optimizer, our budget.

    python tools/original_pretrain.py CLONE RECIPE [key=value ...]

CLONE is a clone of facebookresearch/mae. Its main script needs timm 0.3.2 and CUDA, so the loop is written
here after its `engine_pretrain.py` and `main_pretrain.py`: torchvision's RandomResizedCrop, flip, ToTensor
and Normalize on images of class folders, whole batches of each epoch's permutation, a learning rate per
iteration, AdamW with no decay on vectors, `loss.item()` at every step. On the CPU without autocast
(`precision=fp32`), or under bf16 autocast. Dimensions, batch, learning rate, warm-up and the number of steps
are those of the recipe, whose curriculum must be constant.

Writes metrics.jsonl (the keys of a run's), weights.pth (the original's layout) and original.yaml (the
settings) into the recipe's output folder, and refuses one of other settings. Stopped by SIGTERM or Ctrl-C, it
goes on from its last step, and killed, from its state of up to two minutes before; with other draws for the
augmentation. Exit codes of a stop are those of `etpp`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from original_mae import is_clone, original_model
from study_file import recorded
from timm.optim import param_groups_weight_decay
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from etpp_ssl.config import Interrupted, UserError
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.dist.accelerator import StopRequest
from etpp_ssl.files import append_line, replaced_file, write_text
from etpp_ssl.recipe import Recipe
from etpp_ssl.recipe_file import changed_keys

SAVE_SECONDS = 120


def main(arguments: list[str] | None = None) -> None:
    """Parse, check, train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("clone", type=Path, help="a clone of facebookresearch/mae")
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", help="overrides of the recipe, as section.key=value")
    options = parser.parse_intermixed_args(arguments)
    if not is_clone(options.clone):
        parser.error(f"{options.clone} holds no models_mae.py")
    recipe = Recipe.load(options.recipe, options.overrides)
    if recipe.curriculum.name != "constant":
        parser.error("the original has no curriculum: curriculum=constant")
    if recipe.target.name != "pixels" or not recipe.target.norm_pix:
        parser.error("this compares normalised pixels: target=pixels")
    if recipe.model.decoder.name != "mae":
        parser.error("the original has no other decoder: model.decoder=mae")
    if recipe.precision == "fp16" or not isinstance(recipe.data, FolderConfig):
        parser.error("this takes precision=fp32 or bf16, and data.name=folder")
    try:
        train(recipe, options.clone)
    except UserError as error:
        parser.error(str(error))
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        sys.exit(interrupted.exit_code)


def train(recipe: Recipe, clone: Path, save_seconds: float = SAVE_SECONDS) -> None:
    """Train to the end of the budget, from the state in the output folder if there is one.

    Args:
        recipe: the run.
        clone: of the original.
        save_seconds: between two states.

    Raises:
        UserError: if the output folder is of other settings, or there are no images for one batch.
        Interrupted: after SIGTERM or SIGINT, once the step is finished and the state is written.
    """
    folder = Path(recipe.output)
    settings = folder / "original.yaml"
    if settings.is_file():
        changed = changed_keys(Recipe.load(settings), recipe)
        if changed:
            raise UserError(f"{folder} was started with other settings: {'; '.join(changed)}")
    if (folder / "weights.pth").is_file():
        return
    torch.manual_seed(recipe.seed)
    images = open_images(recipe)
    if len(images) < recipe.batch_size:
        raise UserError(f"{len(images)} images are not one batch of {recipe.batch_size}")
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(settings)
    num_steps = recipe.build_curriculum(len(images)).num_steps
    schedule = recipe.optim.learning_rates(recipe.batch_size)
    model = original_model(recipe, recipe.size, clone).train()
    groups = param_groups_weight_decay(model, recipe.optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=schedule.peak, betas=recipe.optim.betas)
    step, before = _resume(folder, model, optimizer)

    start = saved = time.perf_counter()
    with StopRequest() as request:
        for samples in batches(images, recipe, step, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule(step / num_steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bf16"):
                loss, _, _ = model(samples, mask_ratio=recipe.model.final_mask_ratio)
            value = loss.item()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            now = time.perf_counter()
            if step % recipe.log_every_steps == 0 or step == num_steps:
                seen = step * recipe.batch_size
                row = {
                    "step": step,
                    "loss": value,
                    "images_seen": seen,
                    "equivalent_epochs": seen / len(images),
                    "seconds": before + now - start,
                }
                append_line(folder / "metrics.jsonl", json.dumps(row))
                print(f"step {step}/{num_steps} loss {value:.4f} {row['seconds']:.0f} s", flush=True)
            if request.signum or now - saved > save_seconds:
                _save(folder, model, optimizer, step, before + now - start)
                saved = now
            if request.signum:
                raise Interrupted(request.signum, step)
    with replaced_file(folder / "weights.pth") as file:
        torch.save({"model": model.state_dict()}, file)
    (folder / "state.pt").unlink(missing_ok=True)


def open_images(recipe: Recipe) -> datasets.ImageFolder:
    """The training split through the original's transforms."""
    assert isinstance(recipe.data, FolderConfig)
    mean, std = recipe.data.statistics(recipe.in_chans)
    steps = [
        transforms.RandomResizedCrop(
            recipe.size, scale=recipe.data.crop_scale, interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(mean=mean, std=std),
    ]
    folder = recipe.data.folder("train")
    return datasets.ImageFolder(folder, transforms.Compose(steps))


def batches(images: Any, recipe: Recipe, first: int, end: int) -> Iterator[torch.Tensor]:
    """Images of the steps from `first` to `end`, float32 (B, C, H, W)."""
    per_epoch = len(images) // recipe.batch_size
    rows = []
    for epoch in range(first // per_epoch, -(-end // per_epoch)):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(recipe.seed + epoch))
        rows += order[: per_epoch * recipe.batch_size].view(per_epoch, recipe.batch_size).tolist()
    skipped = first // per_epoch * per_epoch
    loader = DataLoader(
        images, batch_sampler=rows[first - skipped : end - skipped], num_workers=recipe.data.num_workers
    )
    for samples, _ in loader:
        yield samples


def _save(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "rng": torch.get_rng_state(),
    }
    with replaced_file(folder / "state.pt") as file:
        torch.save(state, file)


def _resume(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Steps done and seconds spent."""
    if not (folder / "state.pt").is_file():
        return 0, 0.0
    state = torch.load(folder / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    # What was logged after it is done again.
    kept = [row for row in recorded(folder / "metrics.jsonl") if row["step"] <= state["step"]]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    return state["step"], state["seconds"]


if __name__ == "__main__":
    main()
