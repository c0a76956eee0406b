"""`etpp embed`: the features of a data set, written to a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from etpp_ssl.commands.trained import trained_model
from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.sources.base import existing_folder, printable
from etpp_ssl.data.sources.windows import PartSource
from etpp_ssl.data.views import EvalView
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.features import (
    Embeddings,
    EvaluationLoader,
    Features,
    Pool,
    Precision,
    Windows,
    extract_features,
    pool_of,
    write_embeddings,
)
from etpp_ssl.evaluation.measured_on import measured_on
from etpp_ssl.files import check_place
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder

NAMED = 3
"""Of the images that cannot be read, as many are named."""


def of_folder(overrides: Sequence[str], run: RunFolder | None) -> tuple[list[str], Path | None]:
    """Overrides that take all images below a folder, where the first of them is a folder.

    Args:
        overrides: as on the command line.
        run: where their features go.

    Returns:
        The overrides, and the file of the folder's features; None without a folder or a run.

    Raises:
        UserError: if the first is neither a folder nor an override.
    """
    if not overrides or "=" in overrides[0]:
        return list(overrides), None
    folder = existing_folder("the folder to embed", Path(overrides[0])).resolve()
    data = ["data=folder", f"data.root={folder}", "data.split=.", "data.num_images=null"]
    every = ["data.holdout=0", "data.holdout_share=0", "data.label_share=null", "data.labels_per_class=null"]
    key = hashlib.blake2b(str(folder).encode(errors="surrogateescape"), digest_size=4).hexdigest()
    file = None if run is None else run.path / "embeddings" / f"{folder.name}-{key}.safetensors"
    return [*data, *every, *overrides[1:]], file


@process_as_found()
@with_peers()
def embed(
    recipe: Recipe | FinetuneRecipe,
    folder: RunFolder | None,
    out: Path | None,
    *,
    split: str,
    pool: Pool | None,
    batch_size: int,
    precision: Precision = "fp32",
    say: Callable[[str], None],
) -> Path:
    """Write features of all readable images of a split; see `etpp_ssl.evaluation.features`.

    Args:
        recipe: the data and the model, of any task; a classifier's features are what its head reads.
        folder: the run whose newest checkpoint is loaded; None loads the weights that `recipe.init` names.
        out: the file; None is `RUN/embeddings/<split>.safetensors`.
        split: "train" or "eval".
        pool: cls token or mean of the patch tokens; None is the encoder's own.
        batch_size: images that are loaded together.
        precision: of the forward pass. In fp32 features are what an export gives, to the last bit.
        say: told of damaged checkpoints, of the number of images and of those that are left out.

    Returns:
        The file, which the main process has written.

    Raises:
        UserError: if there are no weights or no images, or the file cannot be written.
    """
    if out is None:
        if folder is None:
            raise UserError("a recipe has no folder for features: name the file, --out FILE.safetensors")
        folder.any_recipe()
        out = folder.path / "embeddings" / f"{split}.safetensors"
    check_place(out)
    accelerator = open_accelerator(recipe)
    source = recipe.open_split(split)
    trained = trained_model(recipe, folder, say)
    encoder: Any = trained.model.to(accelerator.device).encoder
    loader = EvaluationLoader(
        accelerator=accelerator,
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=recipe.normaliser(accelerator.device),
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
    )
    images = range(len(source))
    features = extract_features(
        loader, encoder, source, images, pool=pool, batch_size=batch_size, precision=precision
    )
    unreadable = len(source) - len(features.indices)
    if unreadable == len(source):
        raise UserError(f"none of the {unreadable} images of the {split} split can be read")
    if accelerator.is_main_process:
        measured = measured_on(recipe, split, source, trained.trainings)
        say(f"{len(features.indices):,} images, {features.features.shape[1]} features of each")
        if unreadable:
            lost = sorted({*images}.difference(features.indices.tolist()))
            named = ", ".join(repr(printable(source.name(index))) for index in lost[:NAMED])
            more = f" and {unreadable - NAMED} more" if unreadable > NAMED else ""
            say(f"left out: {unreadable} of {len(source)} images cannot be read: {named}{more}")
        numbers = features.indices.tolist()
        embeddings = Embeddings(
            rows=Features(*(rows.cpu() for rows in features)),
            names=[source.name(index) for index in numbers],
            classes=source.classes,
            notes={
                **{key: str(value) for key, value in measured.items()},
                "weights": trained.source,
                "pool": pool or pool_of(encoder),
                "precision": precision,
                "image_size": show_size(recipe.size),
                "crop_pct": f"{recipe.data.crop_pct:g}",
                "num_unreadable": str(unreadable),
            },
            windows=Windows.of(source, numbers) if isinstance(source, PartSource) else None,
        )
        write_embeddings(out, embeddings)
    leave(accelerator)
    return out
