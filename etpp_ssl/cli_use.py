"""Commands on what a training has left: evaluate, export, look; and those that prepare images for one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from etpp_ssl.cli_app import (
    Overrides,
    Pool,
    RecipeArgument,
    RunArgument,
    app,
)
from etpp_ssl.cli_end import (
    is_main_process,
    only_main_process,
    say,
    stops,
    table_console,
)
from etpp_ssl.config import UserError


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
    pool: Annotated[
        Pool | None,
        typer.Option(help="Features of the cls token, or the mean of the patches; by default its own."),
    ] = None,
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
    found = find(run, load(run, precision="fp32"), queries, folder, count=count, pool=pool, say=say)
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
