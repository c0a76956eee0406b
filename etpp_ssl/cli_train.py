"""Commands that train, plan a training, or say what one can be told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from etpp_ssl.cli_app import (
    Fork,
    Overrides,
    RecipeArgument,
    Rescan,
    app,
    complete_recipe,
)
from etpp_ssl.cli_end import (
    is_main_process,
    no_garbage,
    only_main_process,
    say,
    short_process,
    stops,
    table_console,
)


@app.command()
def pretrain(
    recipe: RecipeArgument, overrides: Overrides = None, fork: Fork = None, rescan: Rescan = False
) -> None:
    """Train, or resume from the run folder's newest checkpoint."""
    with no_garbage():
        from etpp_ssl.recipe import Recipe
        from etpp_ssl.train.launch import pretrain as run_pretraining
        from etpp_ssl.weights.from_init import with_network_of_init

    with stops():
        run_pretraining(Recipe.load(recipe, overrides or (), with_network_of_init), fork)


@app.command()
def finetune(
    recipe: RecipeArgument, overrides: Overrides = None, fork: Fork = None, rescan: Rescan = False
) -> None:
    """Train a classifier, from `init` or from scratch, or resume from the run folder's newest checkpoint."""
    with no_garbage():
        from etpp_ssl.commands.repeat import finetune_repeatedly, print_repeats
        from etpp_ssl.recipe import FinetuneRecipe
        from etpp_ssl.train.launch import finetune as run_finetuning
        from etpp_ssl.weights.from_init import with_network_of_init

    with stops():
        chosen = FinetuneRecipe.load(recipe, overrides or (), with_network_of_init)
        if chosen.evaluate.repeats == 1:
            run_finetuning(chosen, fork)
            return
        summary = finetune_repeatedly(chosen)
    if is_main_process():
        print_repeats(summary, table_console())


@app.command()
def transfer(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The folder of a run, or other weights, as init takes them.")
    ],
    overrides: Overrides = None,
    license: Annotated[
        str, typer.Option(help="Licence for the model card, as the Hugging Face hub spells it.")
    ] = "other",
) -> None:
    """Try an encoder on labelled images: kNN, linear, attentive, fine-tuning; export what is better.

    data.root=FOLDER names the images. The fine-tuning run goes to runs/transfer (output=...), with a page of
    all results in report/transfer.html; the same command resumes it.
    """
    from etpp_ssl.commands.transfer import print_transferred
    from etpp_ssl.commands.transfer import transfer as run_protocols
    from etpp_ssl.commands.transfer_recipe import recipe_of
    from etpp_ssl.export import timm
    from etpp_ssl.report.markup import Table
    from etpp_ssl.report.panels import ChannelView
    from etpp_ssl.report.transfer import NAME, write_transfer_page

    try:
        with stops():
            found = run_protocols(recipe_of(run, overrides or (), say), say)
    except KeyboardInterrupt:
        say("etpp: interrupted; the same command resumes after the last finished protocol")
        raise typer.Exit(130) from None
    print_transferred(found, table_console())
    for note in found.notes:
        print(note)
    head, rows = found.table
    page = found.folder / "report" / NAME
    write_transfer_page(
        page,
        title=f"Transfer: {found.folder.name}",
        table=Table(head, rows, "results"),
        notes=found.notes,
        confusion=found.confusion.numpy(),
        classes=found.classes,
        right=found.right,
        wrong=found.wrong,
        view=ChannelView(found.mean, found.std),
    )
    print(f"page: {page}")
    folder = timm.export(str(found.folder), None, license_name=license, say=say)
    print(f"timm: {folder}")
    say(f'in Python: timm.create_model("local-dir:{folder}", pretrained=True)')


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="A recipe.", autocompletion=complete_recipe)],
    overrides: Overrides = None,
    stages: Annotated[int, typer.Option(min=2, max=100, help="Of equal compute.")] = 5,
    bandwidths: Annotated[
        str | None,
        typer.Option(help="Of the shorter side, such as 96,160,224; the paper's unless given."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting.")] = 2,
    margin: Annotated[
        float | None,
        typer.Option(min=0, help="What a smaller bandwidth may be worse by; measured unless given."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="section.key=value,value: settled first, by successive halving. May be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of all runs, the page and the recipe.")] = Path(
        "runs/tune"
    ),
) -> None:
    """Search for a recipe's stages at one fixed compute, judged on a holdout of the training images."""
    from etpp_ssl.commands.tune import Search, chosen_bandwidths
    from etpp_ssl.commands.tune import tune as run_search
    from etpp_ssl.report.markup import Table
    from etpp_ssl.report.tune import NAME, Choice, write_tune_page

    with stops():
        search = Search(
            recipe,
            tuple(overrides or ()),
            stages,
            chosen_bandwidths(bandwidths),
            seeds,
            margin,
            tuple(vary or ()),
            output,
            say,
        )
        found = run_search(search)
    for note in found.notes:
        print(note)
    page = output / NAME
    choices = [Choice(made.title, made.why, Table(*made.table)) for made in found.decisions]
    write_tune_page(page, title=f"Search: {output.name}", notes=found.notes, choices=choices)
    print(f"page: {page}")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time a few steps of each stage here, and print hours.")
    ] = False,
) -> None:
    """Print stages, learning rate, memory and cost, without training."""
    if not measure:
        only_main_process()
    with short_process():
        from etpp_ssl.recipe import load_any
        from etpp_ssl.run_folder import RunFolder
        from etpp_ssl.train.launch import measured_speed
        from etpp_ssl.train.plan import plan_run
        from etpp_ssl.train.plan_table import print_plan
        from etpp_ssl.weights.from_init import with_network_of_init

        chosen = load_any(recipe, overrides or (), with_network_of_init)
        folder = RunFolder(recipe) if os.path.isdir(recipe) else None
        speed = measured_speed(chosen) if measure else None
        if is_main_process():
            print_plan(plan_run(chosen, folder, speed), table_console())


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER-or-RECIPE",
            help="A folder of images, a recipe or a run.",
            autocompletion=complete_recipe,
        ),
    ],
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=0, help="As many are drawn and read; 0 reads all.")] = 2000,
    nodata: Annotated[
        float | None,
        typer.Option(help="Value of pixels without data; by default data.nodata, or one that stands apart."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Recipe to write: it extends RECIPE by the range that was found.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for sheet.png: a few images, and a histogram of each channel.")
    ] = None,
) -> None:
    """Print what values images hold, channel by channel, and the range, mean and std to train them with."""
    only_main_process()
    from etpp_ssl.commands.inspect import SHEET, print_inspection
    from etpp_ssl.commands.inspect import inspect as inspect_images
    from etpp_ssl.report.sheet import write_sheet

    found = inspect_images(source, overrides or (), images=images, nodata=nodata, write=write, out=out)
    print_inspection(found, table_console())
    if out is not None:
        bounds = found.proposal.bounds() if found.proposal is not None else ()
        write_sheet(out / SHEET, found.source, found.indices, found.values, bounds, found.nodata)
        say(f"sheet: {out / SHEET}")


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A recipe to print.", autocompletion=complete_recipe),
    ] = None,
) -> None:
    """List the recipes that come with etpp, or print one: etpp recipes NAME > mine.yaml."""
    only_main_process()
    from etpp_ssl.commands.keys import print_recipes

    print_recipes(name)


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(metavar="[SECTION]", help="Such as model, data=folder or optim.base_lr.")
    ] = None,
) -> None:
    """Print the keys of a recipe: type, default, meaning, and whether a resumed run may change them."""
    only_main_process()
    with short_process():
        from etpp_ssl.commands.keys import print_keys

        print_keys(section, table_console())
