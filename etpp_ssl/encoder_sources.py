"""What `etpp_ssl.load` opens: runs, exports, weights files and the names of timm's models."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from etpp_ssl.config import UserError, as_pair
from etpp_ssl.data.sources.base import default_statistics
from etpp_ssl.encoder import Encoder
from etpp_ssl.evaluation.features import Precision
from etpp_ssl.files import read_text
from etpp_ssl.messages import shown, shown_text
from etpp_ssl.model.masking import Masker, UniformMaskingConfig
from etpp_ssl.model.timm_net import build_net, is_vit, size_switch
from etpp_ssl.model.zoo.swin import make_resizable
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.decoding import Decoding
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.weights.classifier_layouts import in_timm_names
from etpp_ssl.weights.layouts import load_official_mae, recognise
from etpp_ssl.weights.loading import FILES_OF_A_FOLDER, MAX_CONFIG_BYTES, load_classifier_init
from etpp_ssl.weights.reading import FINE_TUNED, load_weights, read_state_dict


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
        raise UserError(f"load takes a path or the name of a timm model, not a {type(source).__name__}")
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
    return encoder.to(device)


def _opened(path: Path, model: str | None, pretrained: bool) -> Encoder:
    is_checkpoint = path.parent.name == "checkpoints"
    run = RunFolder(path.parent.parent if is_checkpoint else path)
    if run.exists():
        if model is not None:
            raise UserError(f"model is {shown(model)}, but {str(path)!r} is a run, which tells its own")
        return _of_run(run, path.name if is_checkpoint else None)
    if os.path.isdir(path):
        return _of_folder(path, model)
    return _of_file(path, model, {}) if os.path.isfile(path) else _of_timm(str(path), model, pretrained)


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
    with torch.random.fork_rng(devices=[]):
        trained = recipe.build_model()
    trained.load_state_dict(
        load_weights(trained.state_dict(), checkpoint.model(), f"checkpoint {checkpoint.path}")
    )
    decoding = Decoding(trained, recipe.target, recipe.build_masker(), recipe.curriculum.crop)
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
    classes = [str(name) for name in checkpoint.state().get("classes") or ()] or None
    args = recipe.model.timm_args(recipe.size, recipe.in_chans, recipe.num_classes(classes))
    with torch.random.fork_rng(devices=[]):
        net = build_net(*args)
    tensors = checkpoint.average() or checkpoint.model()
    named = {name.removeprefix(FINE_TUNED): value for name, value in tensors.items()}
    net.load_state_dict(load_weights(net.state_dict(), named, f"checkpoint {checkpoint.path}"))
    return net, classes


def _of_folder(folder: Path, model: str | None) -> Encoder:
    """An export: timm's, which its `config.json` tells, or weights that tell their architecture."""
    files = [folder / name for name in FILES_OF_A_FOLDER if os.path.isfile(folder / name)]
    if not files:
        raise UserError(
            f"{str(folder)!r} is neither a run nor an export: it has no recipe.yaml, and no "
            f"{' or '.join(FILES_OF_A_FOLDER)}"
        )
    config = _json(folder / "config.json")
    if model is None and "architecture" in config:
        return _of_timm_export(files[0], config)
    return _of_file(files[0], model, {**config, **_json(folder / "preprocessor_config.json")})


def _of_timm_export(file: Path, config: dict[str, Any]) -> Encoder:
    # Older exports of timm have one level.
    described: dict[str, Any] = dict(config.get("pretrained_cfg") or config)
    args = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    if "input_size" in described:
        args.setdefault("in_chans", described["input_size"][0])
    tensors, name = read_state_dict(file), str(config["architecture"])
    net = _new_net(name, pretrained_cfg=described, **args)
    net.load_state_dict(load_weights(net.state_dict(), tensors, repr(str(file))))
    return _described_by_timm(net, f"export {str(file.parent)!r}", classes=config.get("label_names"))


def _of_file(file: Path, model: str | None, config: dict[str, Any]) -> Encoder:
    """Weights that tell their architecture, with what a config of transformers says beside them."""
    if model is not None:
        return _of_named_model(file, model)
    notes: list[str] = []
    tensors, source, size = read_state_dict(file), repr(str(file)), config.get("image_size")
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
        reason = str(error).replace("the state dict", source, 1)
        raise UserError(f"{reason}; of a timm model, give its name: load(..., model=NAME)") from error
    mean, std, assumed = _statistics(trained.encoder.patch_embed.proj.in_channels, config)
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


def _of_named_model(file: Path, name: str) -> Encoder:
    """Weights of the timm model of this name, at that model's size."""
    if not timm.is_model(name.split(".")[0]):
        raise UserError(f"model is {shown(name)}, and timm has no model of that name{_close_to(name)}")
    notes: list[str] = []
    net = _new_net(name, num_classes=0, in_chans=_channels_in(file, name))
    load_classifier_init(net, str(file), notes.append, keep_head=False)
    return _described_by_timm(net, f"weights {str(file)!r}", notes=notes)


def _channels_in(file: Path, name: str) -> int:
    """Channels that the first convolution of a model reads in a file; 3 where it is not found."""
    first = _new_net(name, num_classes=0).default_cfg["first_conv"]
    tensors = in_timm_names(read_state_dict(file)).tensors
    weight = tensors.get(f"{first}.weight")
    return 3 if weight is None or weight.ndim != 4 else weight.shape[1]


def _of_timm(name: str, model: str | None, pretrained: bool) -> Encoder:
    if model is not None:
        raise UserError(f"weights {shown(name, 300)} do not exist")
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"{shown(name, 300)} does not exist, and timm has no model of that name{_close_to(name)}"
        )
    try:
        net = _new_net(name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        # A download can end in anything.
        if not pretrained:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the weights of timm's {name} cannot be loaded: {shown_text(reason, 200)}; pretrained=False "
            f"builds it with random ones"
        ) from error
    return _described_by_timm(net, f"timm's {name}" if pretrained else f"timm's {name} with random weights")


def _close_to(name: str) -> str:
    close = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f"; close names: {', '.join(close)}" if close else ""


def _new_net(name: str, **args: Any) -> Any:
    """timm's model of a name; one that resamples its positions runs at any size that it can take.

    A plain ViT does so in `etpp_ssl.evaluation.feature_maps`, as in pre-training.
    """
    switch = {} if is_vit(name) else size_switch(name)
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name, **{**args, **switch})
    make_resizable(net)
    return net


def _described_by_timm(
    net: Any, origin: str, *, classes: list[str] | None = None, notes: Iterable[str] = ()
) -> Encoder:
    """With the size, normalisation and crop that timm's `pretrained_cfg` states."""
    config = resolve_model_data_config(net)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    layer = dict(net.named_modules()).get(str(net.pretrained_cfg.get("first_conv")))
    in_chans = layer.in_channels if isinstance(layer, nn.Conv2d) else config["input_size"][0]
    mean, std, assumed = _statistics(in_chans, {"image_mean": config["mean"], "image_std": config["std"]})
    own_way = config["interpolation"] != "bicubic" or config["crop_mode"] != "center"
    resized = f"timm resizes by {config['interpolation']} and crops by {config['crop_mode']}"
    return Encoder(
        net,
        image_size=(size[0], size[1]),
        mean=mean,
        std=std,
        crop_pct=config["crop_pct"],
        classes=classes,
        origin=origin,
        notes=(*notes, *assumed, *((f"{resized}; here it is bicubic, center",) if own_way else ())),
    )


def _statistics(
    in_chans: int, config: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Mean and standard deviation of a config in transformers' words, or the usual ones with a note."""
    mean, std = config.get("image_mean"), config.get("image_std")
    if mean and std and len(mean) == len(std) == in_chans:
        return tuple(mean), tuple(std), ()
    mean, std = default_statistics(in_chans)
    return mean, std, (f"nothing tells the normalisation: mean {list(mean)} and std {list(std)} are assumed",)


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
