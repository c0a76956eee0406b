"""What `init` points at: a run, an export or somebody else's file, read but not yet understood.

Weights that a new pre-training run starts from: `init`, be it a run, an export or somebody else's file.

Weights that fine-tuning starts from: `init`, be it a run, an export or somebody else's file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from etpp_ssl.config import UserError, as_pair
from etpp_ssl.files import read_text
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.patches import grid_of
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.run_folder import MODEL_FILE, Checkpoint, RunFolder
from etpp_ssl.weights.adapt import adapt_weights
from etpp_ssl.weights.adapt_classifier import adapt_classifier
from etpp_ssl.weights.classifier_layouts import in_timm_names
from etpp_ssl.weights.layouts import Weights, recognise
from etpp_ssl.weights.reading import FINE_TUNED, read_state_dict, require_finite

MAX_CONFIG_BYTES = 1 << 20
FILES_OF_A_FOLDER = (MODEL_FILE, "model.pth")
"""What exports write."""


@dataclass(frozen=True)
class StoredWeights:
    """Tensors under their own names, and what something beside them says."""

    tensors: dict[str, Tensor]
    origin: str | None = None
    """Where they are from, where that says more than their layout."""
    image_size: tuple[int, int] | None = None
    num_heads: int | None = None
    position_grid: tuple[int, int] | None = None
    decoder_position_grid: tuple[int, int] | None = None

    def told(self, weights: Weights) -> Weights:
        """Recognised tensors of these with all that is known of them."""
        return replace(
            weights,
            layout=self.origin or weights.layout,
            image_size=self.image_size,
            num_heads=self.num_heads,
            position_grid=self.position_grid,
            decoder_position_grid=self.decoder_position_grid or weights.decoder_position_grid,
        )


def read_stored(init: str, say: Callable[[str], None]) -> StoredWeights:
    """The weights that `init` points at.

    Args:
        init: a run folder, the folder of an export, or a `.pth` or safetensors file.
        say: told of damaged checkpoints that are passed over.

    Raises:
        UserError: if there is nothing to read or it is refused.
    """
    path = Path(init).expanduser()
    try:
        if os.path.isfile(path / "recipe.yaml"):
            return _of_run(RunFolder(path), say)
        if not os.path.isdir(path):
            return StoredWeights(read_state_dict(path))
        files = [path / name for name in FILES_OF_A_FOLDER if os.path.isfile(path / name)]
        if not files:
            raise UserError(f"a folder without recipe.yaml and without {' or '.join(FILES_OF_A_FOLDER)}")
        return _with_config(StoredWeights(read_state_dict(files[0])), path / "config.json")
    except UserError as error:
        raise UserError(f"init {init!r}: {error}") from error


def _of_run(run: RunFolder, say: Callable[[str], None]) -> StoredWeights:
    checkpoint = run.newest(say)
    if checkpoint is None:
        raise UserError(f"run {str(run.path)!r} has no checkpoint yet")
    tensors = checkpoint.model()
    require_finite({**tensors, **(checkpoint.average() or {})}, f"checkpoint {str(checkpoint.path)!r}")
    if all(name.startswith(FINE_TUNED) for name in tensors):
        return _of_fine_tuning(run, checkpoint, tensors)
    recipe = run.recipe()
    _, args = recipe.model.encoder_args(recipe.size, recipe.in_chans)
    counted = recipe.model.position_grid or grid_of(recipe.size, recipe.patch_size)
    return StoredWeights(
        tensors,
        f"a run's checkpoint of step {checkpoint.step}",
        image_size=recipe.size,
        num_heads=args["num_heads"],
        position_grid=counted if recipe.model.pos_embed == "sincos" else None,
        decoder_position_grid=counted,
    )


def _of_fine_tuning(run: RunFolder, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> StoredWeights:
    """A classifier of ours; the average of its weights, which is what was evaluated, where there is one."""
    recipe, average = run.any_recipe(), checkpoint.average()
    assert isinstance(recipe, FinetuneRecipe)
    _, args = recipe.model.timm_args(recipe.size, recipe.in_chans, num_classes=1)
    heads = args.get("num_heads")
    which = "checkpoint" if average is None else "averaged weights (EMA)"
    return StoredWeights(
        tensors if average is None else average,
        f"a fine-tuning run's {which} of step {checkpoint.step}",
        image_size=recipe.size,
        # Pyramids have a list of them, one for each stage.
        num_heads=heads if isinstance(heads, int) else None,
    )


def _with_config(stored: StoredWeights, config_file: Path) -> StoredWeights:
    """What a folder of timm or transformers says beside the tensors: image size and number of heads."""
    try:
        config: Any = json.loads(read_text(config_file, MAX_CONFIG_BYTES))
        args = config.get("model_args") or {}
        size = args.get("img_size") or config.get("image_size") or config["pretrained_cfg"]["input_size"][1:]
        height, width = as_pair(size)
        heads = args.get("num_heads") or config.get("num_attention_heads")
        return replace(
            stored,
            image_size=(int(height), int(width)),
            # Pyramids have a list of them, one for each stage.
            num_heads=heads if isinstance(heads, int) else None,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        # Another's folder: the tensors have to do.
        return stored


def load_init(model: MaskedAutoencoder, init: str, say: Callable[[str], None]) -> None:
    """Start a model from other weights, as far as they serve; see `etpp_ssl.weights.adapt`.

    Args:
        model: freshly initialised; changed in place.
        init: a run folder (all of the model), the folder of an export, or a `.pth` or safetensors file
            in one of the layouts of `etpp_ssl.weights.layouts`.
        say: told what was loaded, converted, dropped and initialised anew.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another model.
    """
    source = f"init {init!r}"
    stored = read_stored(init, say)
    weights = stored.told(recognise(stored.tensors, source))
    state, notes = adapt_weights(weights, model, source)
    model.load_state_dict(state)
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)


def load_classifier_init(
    net: nn.Module, init: str, say: Callable[[str], None], *, keep_head: bool = True
) -> None:
    """Start a classifier from other weights, as far as they serve; see `etpp_ssl.weights.adapt_classifier`.

    Args:
        net: a freshly initialised timm model at base resolution; changed in place.
        init: the folder of a pre-training or fine-tuning run, the folder of an export, or a `.pth` or
            safetensors file in timm's names or a layout of `etpp_ssl.weights.classifier_layouts`.
        say: told what was loaded, converted, dropped and initialised anew, a line each.
        keep_head: take over a head of as many classes. Say no where they are not the same classes.

    Raises:
        UserError: if there is nothing to read, it is refused, or it is of another network.
    """
    source = f"init {init!r}"
    stored = read_stored(init, say)
    weights = stored.told(in_timm_names(stored.tensors, source))
    state, notes = adapt_classifier(weights, net, source, keep_head=keep_head)
    net.load_state_dict(state)
    for line in (f"{source} is {weights.layout}", *notes):
        say(line)
