"""The command line: parse, call, print; nothing else."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from etpp_ssl.config import UserError

# Idle OpenMP threads sleep instead of spinning: on a machine that others use too (data workers among
# them), spinning threads can slow a step twentyfold. libgomp reads this when torch is loaded, which is
# why the commands import torch, and everything that needs it, only when they run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    name="etpp",
    help="Masked-autoencoder pre-training under the EfficientTrain++ curriculum.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe (YAML), or the folder of a run.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as section.key=value."),
]


class Target(StrEnum):
    """Formats to export to."""

    timm = "timm"


class Pool(StrEnum):
    """How an exported encoder makes one vector of an image."""

    token = "token"
    avg = "avg"


@app.command()
def pretrain(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    fork: Annotated[
        Path | None,
        typer.Option(help="Start from this run's newest checkpoint, in a new folder."),
    ] = None,
) -> None:
    """Train, or go on from the run folder's newest checkpoint."""
    from etpp_ssl.engine.pretrain import pretrain as run_pretraining
    from etpp_ssl.engine.signals import Interrupted
    from etpp_ssl.recipe import load_recipe

    try:
        run_pretraining(load_recipe(recipe, overrides or ()), fork)
    except Interrupted as interrupted:
        if is_main_process():
            say(f"etpp: {interrupted}; the same command goes on from there")
        raise typer.Exit(interrupted.exit_code) from None


@app.command()
def plan(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print stages, learning rate, memory and cost, without training."""
    from etpp_ssl.engine.plan import plan_run
    from etpp_ssl.engine.plan_table import print_plan
    from etpp_ssl.recipe import load_recipe

    # A pipe has no width; the table needs its own.
    wide = None if sys.stdout.isatty() else 140
    print_plan(plan_run(load_recipe(recipe, overrides or ())), Console(width=wide, highlight=False))


@app.command()
def probe(run: RunArgument, overrides: Overrides = None) -> None:
    """Evaluate a run's encoder as it stands, for instance with probe=knn."""
    from etpp_ssl.engine.probe import probe_run
    from etpp_ssl.recipe import load_recipe
    from etpp_ssl.run_folder import RunFolder

    folder = RunFolder(run)
    folder.recipe()
    recipe = load_recipe(run, overrides or ())
    numbers = probe_run(recipe, folder, say)
    if is_main_process():
        protocol = " ".join(f"{k}={v}" for k, v in recipe.probe.model_dump().items() if v is not None)
        for name, value in numbers.items():
            print(f"{name} {value:.4f} ({protocol})")


@app.command()
def export(
    run: RunArgument,
    to: Annotated[Target, typer.Option(help="Format.")] = Target.timm,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/export/timm.")] = None,
    pool: Annotated[
        Pool | None, typer.Option(help="Pooling of the exported encoder; by default its own.")
    ] = None,
    license: Annotated[
        str, typer.Option(help="Licence for the model card, as the Hugging Face hub spells it.")
    ] = "other",
) -> None:
    """Write a run's encoder as a folder that stock timm loads."""
    from etpp_ssl.export.timm import export as export_timm

    folder = export_timm(
        run, out, pool=pool.value if pool is not None else None, license_name=license, say=say
    )
    print(f"{to.value}: {folder}")


@app.command()
def reconstruct(
    run: RunArgument,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE", help="Files and folders; by default a few images of the run's own data."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; by default RUN/report/reconstruction.")
    ] = None,
    checkpoint: Annotated[int | None, typer.Option(help="Its step; by default the newest.")] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Pixels that the model gets, as 96 or 96x128; by default all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the masks; by default the run's.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Images of each folder, or of the run's data.")] = 8,
) -> None:
    """Show what a run makes of masked images: one PNG per image."""
    from etpp_ssl.report.reconstruction import parse_bandwidth
    from etpp_ssl.report.viewer import write_grids

    files = write_grids(
        run,
        images or (),
        out=out,
        step=checkpoint,
        bandwidth=None if bandwidth is None else parse_bandwidth(bandwidth),
        seed=seed,
        count=count,
        say=say,
    )
    for file in files:
        print(file)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Folders of runs.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; by default RUN/report/index.html of the first.")
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several side by side."""
    from etpp_ssl.report.page import write_report

    print(write_report(runs, out, say=say))


def say(text: str) -> None:
    """A message beside the result."""
    print(text, file=sys.stderr)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several."""
    return os.environ.get("RANK", "0") == "0"


def main(arguments: list[str] | None = None) -> Any:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        return app(args=arguments)
    except UserError as error:
        rank = "" if is_main_process() else f" [process {os.environ['RANK']}]"
        say(f"etpp: error:{rank} {' '.join(str(error).split())}")
        sys.exit(2)
