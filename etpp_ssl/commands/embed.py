"""`etpp embed`: the features of a data set, written to a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.views import EvalView
from etpp_ssl.dist.accelerator import open_accelerator, process_as_found
from etpp_ssl.dist.peers import leave, with_peers
from etpp_ssl.evaluation.features import (
    Embeddings,
    Features,
    Pool,
    extract_features,
    make_room,
    run_precision,
    write_embeddings,
)
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.weights.loading import load_init, load_trained


@process_as_found()
@with_peers()
def embed(
    recipe: Recipe,
    folder: RunFolder | None,
    out: Path | None,
    *,
    split: str,
    pool: Pool | None,
    batch_size: int,
    say: Callable[[str], None],
) -> Path:
    """Write features of all readable images of a split; see `etpp_ssl.evaluation.features`.

    The forward pass is in bf16 if that is the recipe's precision.

    Args:
        recipe: the data and the model.
        folder: the run whose newest checkpoint is loaded; None loads the weights that `recipe.init` names.
        out: the file; None is `RUN/embeddings/<split>.safetensors`.
        split: "train" or "eval".
        pool: cls token or mean of the patch tokens; None is the encoder's own.
        batch_size: images that are loaded together.
        say: told of damaged checkpoints and of images that are left out.

    Returns:
        The file, which the main process has written.

    Raises:
        UserError: if there are no weights or no images, or the file cannot be written.
    """
    if out is None:
        if folder is None:
            raise UserError("a recipe has no folder for features: name the file, --out FILE.safetensors")
        folder.recipe()
        out = folder.path / "embeddings" / f"{split}.safetensors"
    # Before the work, not after it.
    make_room(out)
    accelerator = open_accelerator(recipe)
    source = recipe.open_split(split)
    model = freshly_initialised(recipe.seed, recipe.build_model)
    if folder is not None:
        checkpoint = folder.trained(say)
        load_trained(model, checkpoint)
        weights = str(checkpoint.path)
    elif recipe.init is not None:
        load_init(model, recipe.init, say)
        weights = recipe.init
    else:
        raise UserError("there are no weights to embed with: give a run, or init=WEIGHTS with the recipe")
    model.to(accelerator.device)
    features = extract_features(
        model.encoder,
        source,
        list(range(len(source))),
        view=EvalView(recipe.size, recipe.data.crop_pct),
        normalise=recipe.normaliser(accelerator.device),
        accelerator=accelerator,
        pool=pool,
        batch_size=batch_size,
        num_workers=recipe.data.num_workers,
        stall_seconds=recipe.data.stall_seconds,
    )
    unreadable = len(source) - len(features.indices)
    if unreadable == len(source):
        raise UserError(f"none of the {unreadable} images of the {split} split can be read")
    if accelerator.is_main_process:
        if unreadable:
            say(f"left out: {unreadable} of {len(source)} images cannot be read")
        embeddings = Embeddings(
            rows=Features(*(rows.cpu() for rows in features)),
            names=[source.name(index) for index in features.indices.tolist()],
            classes=source.classes,
            notes={
                "split": split,
                "weights": weights,
                "pool": pool or model.encoder.global_pool,
                "precision": run_precision(accelerator),
                "image_size": show_size(recipe.size),
                "crop_pct": f"{recipe.data.crop_pct:g}",
                "num_unreadable": str(unreadable),
            },
        )
        write_embeddings(out, embeddings)
    leave(accelerator)
    return out
