"""The table at the end of the quickstart: what a run did, read from its folder.

python tools/quickstart_summary.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from etpp_ssl.config import show_size
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.views import Normalise
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.tasks.mae import build_probe


def untrained_knn(recipe: Recipe) -> float:
    """What the same probe says of the encoder before training, in per cent."""
    accelerator = open_accelerator(recipe)
    mean, std = recipe.data.statistics(recipe.in_chans)
    normalise = Normalise(mean, std, accelerator.device)
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
    assert probe is not None
    torch.manual_seed(recipe.seed)
    return probe.run(recipe.build_model().to(accelerator.device))["knn_top1"]


def main(path: Path) -> None:
    """Print stages, probe and export of a run, and check the export against the checkpoint."""
    run = RunFolder(path)
    recipe = run.recipe()
    rows = [row for row in run.metrics() if "loss" in row]
    source = open_split(
        recipe.data, "train", in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed
    )
    curriculum = recipe.build_curriculum(len(source))
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)

    table = Table(box=box.SIMPLE, title="What happened", title_justify="left")
    for title in ("stage", "bandwidth", "steps", "images", "first loss", "last loss", "seconds", "images/s"):
        table.add_column(title, justify="right")
    before = 0.0
    for stage in curriculum.stages:
        inside = [row for row in rows if row["stage"] == stage.index]
        seconds = inside[-1]["seconds"] - before
        before = inside[-1]["seconds"]
        images = stage.num_steps * stage.batch_size
        table.add_row(
            str(stage.index + 1),
            show_size(stage.bandwidth),
            str(stage.num_steps),
            f"{images:,}",
            f"{inside[0]['loss']:.4f}",
            f"{inside[-1]['loss']:.4f}",
            f"{seconds:.0f}",
            f"{images / seconds:.0f}",
        )
    console.print(table)
    console.print("(losses of different stages are of different pictures: they do not compare)")

    for line in (path / "report" / "probes.jsonl").read_text(encoding="utf-8").splitlines()[-1:]:
        result = json.loads(line)
        chance = 100 / len(source.classes or ())
        console.print(
            f"kNN on frozen features: {result['knn_top1']:.1f} % "
            f"(untrained encoder: {untrained_knn(recipe):.1f} %, chance: {chance:.1f} %)"
        )

    folder = path / "export" / "timm"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.inference_mode():
        features = model(torch.zeros(1, recipe.in_chans, *recipe.size))
    trained = run.trained(print).model()
    exported = load_file(folder / "model.safetensors")
    same = all(torch.equal(value, trained[f"encoder.{name}"]) for name, value in exported.items())
    console.print(
        f"timm loads {folder}: {type(model).__name__}, features {tuple(features.shape)}, "
        f"weights {'equal' if same else 'NOT equal'} to the checkpoint's"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
