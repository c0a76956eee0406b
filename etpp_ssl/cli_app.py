"""The application of the command line, and the arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from etpp_ssl import __version__
from etpp_ssl.cli_end import (
    no_garbage,
)

# Idle OpenMP threads sleep instead of spinning: on a machine that others use too (data workers among
# them), spinning threads can slow a step twentyfold. libgomp reads this when torch is loaded, which is
# why the commands import torch, and everything that needs it, only when they run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Warnings of torch's C++ part do not go through Python's logging: of a missing instruction set, or twenty
# lines of stack where the store of another process ends. Its errors stay. Read when torch is loaded, too.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

app = typer.Typer(
    name="etpp",
    help="Masked-autoencoder pre-training and supervised training under the EfficientTrain++ curriculum.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def complete_recipe(begun: str) -> list[str]:
    """Names of shipped recipes that begin so, for a shell's completion."""
    from etpp_ssl.recipe_file import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(begun)]


def _complete_override(begun: str) -> list[str]:
    from etpp_ssl.commands.keys import sections

    keys = {f"{key.path}=" for section in sections() for key in section.keys}
    return sorted(key for key in keys if key.startswith(begun))


def _print_version(asked: bool) -> None:
    if asked:
        print(f"etpp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, a recipe's name, or the folder of a run.",
        autocompletion=complete_recipe,
    ),
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Overrides, as section.key=value; `etpp keys` prints all keys.",
        autocompletion=_complete_override,
    ),
]

Fork = Annotated[
    Path | None,
    typer.Option(help="Start from this run's newest checkpoint, or from this checkpoint, in a new folder."),
]


def _look_again(asked: bool) -> None:
    if asked:
        with no_garbage():
            from etpp_ssl.data.sources.kept_index import rescan

        rescan()


Rescan = Annotated[
    bool,
    typer.Option(
        "--rescan", callback=_look_again, help="Look for the names of images again, whatever index is kept."
    ),
]
Pool = Literal["token", "avg"]
"""How an encoder makes one vector of an image."""
