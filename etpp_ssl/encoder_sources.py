"""What `etpp_ssl.load` opens: runs, exports, weights files and the names of timm's models."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from etpp_ssl.config import UserError, as_pair
from etpp_ssl.encoder import Encoder
from etpp_ssl.encoder_timm import encoder_of_export, encoder_of_file, encoder_of_name, known_statistics
from etpp_ssl.evaluation.features import Precision
from etpp_ssl.files import read_text
from etpp_ssl.messages import shown, shown_text
from etpp_ssl.model.mask_patterns import UniformMaskingConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.model.timm_net import build_net
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.reconstruction import Decoding
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.weights.layouts import recognise
from etpp_ssl.weights.loading import MAX_CONFIG_BYTES, load_trained
from etpp_ssl.weights.official import load_official_mae
from etpp_ssl.weights.reading import FILES_OF_A_FOLDER, read_state_dict, weights_in


def load(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    precision: Precision | None = None,
) -> Encoder:
    """Open an encoder, with all that its images need: size, normalisation and crop.

    Args:
        source: one of

            - the folder of a run, which gives its newest whole checkpoint, or of one checkpoint in it. Of a
              fine-tuning run the classifier, with the moving average of its weights where there is one.
            - the folder of an export, by `etpp export` or by timm (`config.json` and `model.safetensors`).
            - a `.safetensors` or `.pth` file of a plain ViT or an MAE, in timm's, MAE's or Hugging Face's
              names. Nothing in it is executed. It tells no normalisation: ImageNet's is taken, see
              `Encoder.notes`.
            - the name of a timm model, such as "vit_base_patch16_224.mae".
        model: the name of the timm model that a weights file is of, where its tensors do not tell it.
        pretrained: of a timm name: load its weights, which may download them; otherwise they are random.
        device: by default the accelerator, if there is one.
        precision: of the forward pass. None is the run's own (fp32 for one in fp16), and fp32 for anything
            else.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        UserError: if there is nothing to open, or it is damaged, refused, or not understood.
    """
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise UserError(f"load takes a path or the name of a timm model; this is of type {kind}")
    if precision not in (None, "fp32", "bf16"):
        raise UserError(f"precision is {shown(precision)}; valid are 'fp32', 'bf16' and None")
    path = Path(source).expanduser()
    with _told(str(path)):
        encoder = _opened(path, model, pretrained)
    if precision is not None:
        encoder.precision = precision
    if device is None:
        # torch names the accelerator that it was built for even where there is none.
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found or "cpu"
    try:
        return encoder.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device is {shown(str(device))}: {str(error).splitlines()[0]}") from error


def _opened(path: Path, model: str | None, pretrained: bool) -> Encoder:
    if path.name in FILES_OF_A_FOLDER and model is None and _tells_more(path.parent):
        path = path.parent
    is_checkpoint = path.parent.name == "checkpoints"
    run = RunFolder(path.parent.parent if is_checkpoint else path)
    if run.exists():
        if model is not None:
            raise UserError(f"model is {shown(model)}, but {str(path)!r} is a run, which tells its own")
        return _of_run(run, path.name if is_checkpoint else None)
    if os.path.isdir(path):
        return _of_folder(path, model)
    if os.path.isfile(path):
        return _of_file(path, model, {})
    if model is not None:
        raise UserError(f"{shown(str(path), 300)} does not exist")
    return encoder_of_name(str(path), pretrained=pretrained)


def _tells_more(folder: Path) -> bool:
    """Whether something beside a file of weights tells more: an export's config, or a run's recipe."""
    return os.path.isfile(folder / "config.json") or RunFolder(folder.parent.parent).exists()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Configs of others may say anything: what torch and timm make of it becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{shown(name, 300)} cannot be opened: {shown_text(reason)}") from error


def _of_run(run: RunFolder, step: str | None) -> Encoder:
    checkpoint = _checkpoint(run, step)
    recipe = run.any_recipe()
    described: dict[str, Any] = {
        "image_size": recipe.size,
        "crop_pct": recipe.data.crop_pct,
        "max_pixels": recipe.data.max_pixels,
        "precision": "bf16" if recipe.precision == "bf16" else "fp32",
    }
    described["mean"], described["std"] = recipe.data.statistics(recipe.in_chans)
    origin = f"step {checkpoint.step} of run {str(run.path)!r}"
    if isinstance(recipe, FinetuneRecipe):
        net, classes = _classifier(recipe, checkpoint)
        return Encoder(net, origin=f"the classifier of {origin}", classes=classes, **described)
    trained = freshly_initialised(recipe.seed, recipe.build_model)
    load_trained(trained, checkpoint)
    decoding = Decoding(trained, recipe.target, recipe.build_masker(), recipe.curriculum.crop == "lanczos")
    return Encoder(trained.encoder, origin=origin, decoding=decoding, **described)


def _checkpoint(run: RunFolder, step: str | None) -> Checkpoint:
    """The newest whole checkpoint, or the one of a folder's name."""
    if step is None:
        return run.trained(lambda line: warnings.warn(line, stacklevel=8))
    for checkpoint in run.checkpoints():
        if checkpoint.path.name == step:
            fault = checkpoint.fault()
            if fault is None:
                return checkpoint
            raise UserError(f"checkpoint {str(checkpoint.path)!r} is damaged: {fault}")
    raise UserError(f"run {str(run.path)!r} has no checkpoint {shown(step)}")


def _classifier(recipe: FinetuneRecipe, checkpoint: Checkpoint) -> tuple[nn.Module, list[str] | None]:
    """A run's classifier as timm builds it, and its classes."""
    classes = checkpoint.classes() or None
    architecture, args = recipe.model.timm_args(recipe.size, recipe.in_chans, recipe.num_classes(classes))
    net = freshly_initialised(recipe.seed, lambda: build_net(architecture, args))
    # In checkpoints its tensors are those of a `Classifier`, named net.*.
    load_trained(nn.ModuleDict({"net": net}), checkpoint)
    return net, classes


def _of_folder(folder: Path, model: str | None) -> Encoder:
    """An export: timm's, which its `config.json` tells, or weights that tell their architecture."""
    file = weights_in(folder)
    if file is None:
        raise UserError(
            f"{str(folder)!r} is neither a run nor an export: it has no recipe.yaml, and no "
            f"{' or '.join(FILES_OF_A_FOLDER)}"
        )
    config = _json(folder / "config.json")
    if model is None and "architecture" in config:
        return encoder_of_export(file, config)
    return _of_file(file, model, {**config, **_json(folder / "preprocessor_config.json")})


def _of_file(file: Path, model: str | None, config: dict[str, Any]) -> Encoder:
    """Weights that tell their architecture, with what a config of transformers says beside them."""
    if model is not None:
        return encoder_of_file(file, model)
    notes: list[str] = []
    tensors, source, size = read_state_dict(file, notes), repr(str(file)), config.get("image_size")
    try:
        with torch.random.fork_rng(devices=[]):
            trained = load_official_mae(
                tensors,
                image_size=None if size is None else as_pair(size),
                num_heads=config.get("num_attention_heads"),
                decoder_num_heads=config.get("decoder_num_attention_heads"),
                mask_ratio=config.get("mask_ratio", 0.75),
                say=notes.append,
            )
    except UserError as error:
        reason = str(error).replace("the state dict", source, 1).split("; ")[0]
        raise UserError(f"{reason}; of a timm model, give its name: load(..., model=NAME)") from error
    mean, std, assumed = known_statistics(trained.encoder.patch_embed.proj.in_channels, config)
    decoding = None
    if recognise(tensors, source).has_decoder:
        pixels = PixelsConfig(norm_pix=config.get("norm_pix_loss", True))
        masker = Masker(UniformMaskingConfig(), trained.mask_ratio, None, trained.patch_size, 0)
        decoding = Decoding(trained, pixels, masker)
    grid = trained.encoder.patch_embed.grid_size
    return Encoder(
        trained.encoder,
        image_size=(grid[0] * trained.patch_size[0], grid[1] * trained.patch_size[1]),
        mean=mean,
        std=std,
        origin=f"weights {source}",
        notes=(*[note.replace("the state dict", source, 1) for note in notes], *assumed),
        decoding=decoding,
    )


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    if not os.path.isfile(file):
        return {}
    try:
        content = json.loads(read_text(file, MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(file)!r} cannot be read as JSON: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{str(file)!r} does not hold an object")
    return content
