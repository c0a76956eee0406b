"""The command line: parse, call, print; nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from etpp_ssl import __version__
from etpp_ssl.cli_end import (
    endings,
    is_main_process,
    no_garbage,
    only_main_process,
    say,
    short_process,
    stops,
    table_console,
)
from etpp_ssl.config import UserError

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


def _complete_recipe(begun: str) -> list[str]:
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
        autocompletion=_complete_recipe,
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
    recipe: Annotated[str, typer.Argument(help="A recipe.", autocompletion=_complete_recipe)],
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
            autocompletion=_complete_recipe,
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
        typer.Argument(metavar="[NAME]", help="A recipe to print.", autocompletion=_complete_recipe),
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


@app.command()
def evaluate(
    run: RunArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write, or a FILE.json; by default RUN/report/evaluation/ and the split's name."
        ),
    ] = None,
) -> None:
    """Evaluate a run's classifier: accuracy, calibration, recall of each class, confusion matrix."""
    from etpp_ssl.commands.evaluate import classifier_of, evaluate_run, place_of
    from etpp_ssl.evaluation.measured_on import in_words, shown_number, training_mark
    from etpp_ssl.report.confusion import check_evaluation_place, write_evaluation
    from etpp_ssl.run_folder import RunFolder

    folder, recipe = RunFolder(run), classifier_of(run, overrides or ())
    place = check_evaluation_place(place_of(recipe, folder) if out is None else out)
    evaluated = evaluate_run(recipe, folder, say)
    if is_main_process():
        # Before they are written: what has been computed is not lost with a disk.
        beside = f"; {evaluated.without_looking}" if evaluated.without_looking else ""
        print(f"images: {in_words(evaluated.data)}{beside}")
        mark = f" ({training_mark(evaluated.data)})" if training_mark(evaluated.data) else ""
        for name, value in evaluated.result.numbers().items():
            if value is not None:
                print(f"{name} {shown_number(name, value)}{'' if isinstance(value, int) else mark}")
        sys.stdout.flush()
        if evaluated.collapse:
            say(f"warning: {evaluated.collapse}")
        result, classes, protocol, data, _, collapse = evaluated
        write_evaluation(place, result, classes, protocol, data, collapse)
        print(f"evaluation: {place}")


@app.command()
def probe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    untrained: Annotated[
        bool,
        typer.Option("--untrained", help="Probe the encoder with initial weights, too, for comparison."),
    ] = False,
) -> None:
    """Evaluate an encoder as it stands: a run's, or with a recipe the weights of init=FILE-or-RUN."""
    from etpp_ssl.commands.probe import probe_run
    from etpp_ssl.recipe import load_probed
    from etpp_ssl.weights.from_init import with_network_of_init

    with stops("probe"):
        probe_run(
            load_probed(recipe, overrides or (), with_network_of_init), recipe, say, untrained=untrained
        )


@app.command()
def embed(
    recipe: RecipeArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FOLDER] [KEY=VALUE]...",
            help="Images, instead of the run's own data, and overrides, as section.key=value.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; by default RUN/embeddings/<split or folder>.safetensors."),
    ] = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Part of the data set.")] = "train",
    pool: Annotated[
        Pool | None, typer.Option(help="cls token or mean of the patch tokens; by default the encoder's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are loaded together.")] = 256,
    precision: Annotated[
        Literal["fp32", "bf16"],
        typer.Option(help="fp32 gives an export's features; bf16 is faster on a GPU."),
    ] = "fp32",
) -> None:
    """Write features, labels and file names of a data set, from a run or from a recipe with init=WEIGHTS."""
    from etpp_ssl.commands.embed import embed as write_features
    from etpp_ssl.commands.embed import of_folder
    from etpp_ssl.recipe import load_any
    from etpp_ssl.run_folder import RunFolder
    from etpp_ssl.weights.from_init import with_network_of_init

    run = RunFolder(recipe) if os.path.isdir(recipe) else None
    wanted, own_file = of_folder(overrides or (), run)
    file = write_features(
        load_any(recipe, wanted, with_network_of_init),
        run,
        out or own_file,
        split=split,
        pool=pool,
        batch_size=batch_size,
        precision=precision,
        say=say,
    )
    if is_main_process():
        print(file)


@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        Literal["timm", "mae", "transformers", "dinov3", "pixio", "onnx"], typer.Option(help="Format.")
    ] = "timm",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; by default RUN/export/<format>. Of onnx the file, model.onnx."),
    ] = None,
    pool: Annotated[
        Pool | None, typer.Option(help="Pooling of an encoder exported to timm or onnx; by default its own.")
    ] = None,
    license: Annotated[
        str, typer.Option(help="Licence for the model card, as the Hugging Face hub spells it.")
    ] = "other",
    normalise: Annotated[
        bool, typer.Option("--normalise", help="onnx: take raw values, and normalise them in the graph.")
    ] = False,
    static_batch: Annotated[
        bool, typer.Option("--static-batch", help="onnx: one image at a time, not any number.")
    ] = False,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="onnx: any size of whole patches, where positions allow.")
    ] = False,
    opset: Annotated[int, typer.Option(help="onnx: version of its operations, 18 to 23.")] = 18,
) -> None:
    """Write a run's weights for timm, the original MAE code, transformers or onnxruntime."""
    only_main_process()
    from etpp_ssl.export import encoder_only, official, timm

    if pool is not None and to not in ("timm", "onnx"):
        raise UserError(f"--pool {pool} is for --to timm and onnx; a folder of {to} gives all tokens")
    chosen = {"--normalise": normalise, "--static-batch": static_batch, "--dynamic-size": dynamic_size}
    misplaced = [name for name, value in chosen.items() if value] + ["--opset"] * (opset != 18)
    if misplaced and to != "onnx":
        raise UserError(f"{misplaced[0]} is for --to onnx, not for --to {to}")
    if to == "onnx":
        from etpp_ssl.encoder_sources import load
        from etpp_ssl.export.onnx import export_onnx

        written = export_onnx(
            load(run, device="cpu"),
            out or Path(run) / "export" / "onnx" / "model.onnx",
            pool=pool,
            normalise=normalise,
            dynamic_batch=not static_batch,
            dynamic_size=dynamic_size,
            opset=opset,
        )
        print(f"onnx: {written.file}")
        say(f"input {written.shape}, opset {written.opset}; differs from torch by {written.difference:.2g}")
        return
    if to == "timm":
        folder = timm.export(run, out, pool=pool, license_name=license, say=say)
    else:
        writers: dict[str, Callable[..., Path]] = {
            "mae": official.export_mae,
            "transformers": official.export_transformers,
            "dinov3": partial(encoder_only.export, encoder_only.DINOV3),
            "pixio": partial(encoder_only.export, encoder_only.PIXIO),
        }
        folder = writers[to](run, out, license_name=license, say=say)
    print(f"{to}: {folder}")
    if to == "timm":
        say(f'in Python: timm.create_model("local-dir:{folder}", pretrained=True)')


@app.command()
def search(
    run: RunArgument,
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="Image files.")],
    folder: Annotated[str, typer.Option("--in", help="The folder of images to search.")],
    count: Annotated[int, typer.Option(min=1, help="Images for each query.")] = 8,
    json: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """Print the images of a folder that are most like some others, by cosine of an encoder's features."""
    only_main_process()
    from etpp_ssl.commands.search import check_run
    from etpp_ssl.commands.search import search as find
    from etpp_ssl.encoder_sources import load
    from etpp_ssl.files import check_place, write_json

    check_run(run)
    if json is not None:
        json = check_place(json)
    found = find(run, load(run, precision="fp32"), queries, folder, count=count, say=say)
    for query, names, row in zip(found.queries, found.names, found.similarities.tolist(), strict=True):
        print(query)
        for name, value in zip(names, row, strict=True):
            print(f"  {value:.4f}  {name}")
    if json is not None:
        write_json(json, found.values())


@app.command()
def prepare(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A folder of images, or a list of files.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make, for data.root.")],
    size: Annotated[
        int | None, typer.Option(help="Re-encode: the shorter side has at most so many pixels.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(help="Re-encode: JPEG quality, 1 to 100, colour 4:4:4; 92 with --size.")
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad/--keep-bad",
            help="Leave out unreadable images, which moves later ones up, or keep their places.",
        ),
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(help="Images of more pixels count as unreadable; as data.max_pixels.")
    ] = 178_956_970,
    shard_mb: Annotated[int, typer.Option(help="Size of a shard in megabytes.")] = 1024,
    workers: Annotated[int, typer.Option(help="Images in work at once.")] = os.cpu_count() or 1,
) -> None:
    """Copy images to shards (data=shards), once, for file systems that are slow at small files.

    Bytes are copied as they are, unless --size or --quality is given.
    """
    only_main_process()
    from etpp_ssl.commands.prepare import prepare_shards

    try:
        prepare_shards(
            src,
            dst,
            say,
            size=size,
            quality=quality,
            skip_bad=skip_bad,
            max_pixels=max_pixels,
            shard_mb=shard_mb,
            workers=workers,
        )
    except KeyboardInterrupt:
        say("etpp: interrupted; the same command continues after the last finished shard")
        raise typer.Exit(130) from None


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
    only_main_process()
    from etpp_ssl.report.grid import write_grids
    from etpp_ssl.report.reconstruction import parse_bandwidth

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
        Path | None,
        typer.Option(
            help="HTML file to write; by default RUN/report/index.html, of several runs comparison.html."
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run, or about several side by side."""
    only_main_process()
    from etpp_ssl.report.page import write_report

    print(write_report(runs, out, say=say))


@app.command("replay-nan")
def replay_nan(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="A folder below RUN/dumps.")],
    overrides: Overrides = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """Repeat a step that was not finite, and say where it stops being so; 1 if it is finite here.

    Overrides (precision=fp32, model.attention=unfused, ...) try what might help.
    """
    only_main_process()
    from etpp_ssl.debug.report import print_report, write_report
    from etpp_ssl.debug.reproduce import reproduce

    found = reproduce(dump, overrides or ())
    print_report(found, table_console())
    if json is not None:
        write_report(found, json)
    raise typer.Exit(0 if found.reproduced else 1)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command; a user's mistake is one line on stderr and exit code 2, a fault of a run code 1."""
    with endings(process_ends=arguments is None):
        # Typer's own way to tell a mistake is a box of several lines.
        sys.exit(app(args=arguments, prog_name="etpp", standalone_mode=False) or 0)
