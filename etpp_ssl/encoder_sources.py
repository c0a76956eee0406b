"""What `etpp_ssl.load` opens: runs, exports, weights files and the names of timm's models.

Legend: C channels, H, W pixels.
"""

from __future__ import annotations

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
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.data.sources.base import default_statistics
from etpp_ssl.encoder import Encoder
from etpp_ssl.evaluation.features import Precision
from etpp_ssl.files import read_text
from etpp_ssl.messages import close_names, shown, shown_text
from etpp_ssl.model.class_tokens import pool_class_tokens
from etpp_ssl.model.encoders import encoder_of, is_maskable
from etpp_ssl.model.mask_patterns import UniformMaskingConfig
from etpp_ssl.model.masking import Masker
from etpp_ssl.model.timm_net import build_net, size_switch
from etpp_ssl.model.zoo.swin import make_resizable
from etpp_ssl.randomness import freshly_initialised
from etpp_ssl.recipe import FinetuneRecipe
from etpp_ssl.report.reconstruction import Decoding
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.targets.pixels import PixelsConfig
from etpp_ssl.weights.adapt_classifier import adapt_classifier
from etpp_ssl.weights.layouts import in_timm_names, recognise
from etpp_ssl.weights.loading import MAX_CONFIG_BYTES, load_trained
from etpp_ssl.weights.official import load_official_mae
from etpp_ssl.weights.reading import FILES_OF_A_FOLDER, load_weights, read_state_dict, weights_in


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
    return _of_timms_name(str(path), pretrained=pretrained)


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
        "reading": recipe.data.reading(recipe.in_chans),
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
    pool_class_tokens(net, recipe.model.class_tokens)
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
        return _of_timms_export(file, config)
    return _of_file(file, model, {**config, **_json(folder / "preprocessor_config.json")})


def _of_file(file: Path, model: str | None, config: dict[str, Any]) -> Encoder:
    """Weights that tell their architecture, with what a config of transformers says beside them."""
    if model is not None:
        return _of_timms_file(file, model)
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
                activation=config.get("hidden_act"),
                say=notes.append,
            )
    except UserError as error:
        reason = str(error).replace("the state dict", source, 1).split("; ")[0]
        raise UserError(f"{reason}; of a timm model, give its name: load(..., model=NAME)") from error
    values = config.get("values", {})
    if values:
        config = {**config, "image_mean": values["mean"], "image_std": values["std"]}
    mean, std, assumed = _statistics(trained.encoder.patch_embed.proj.in_channels, config)
    decoding = None
    if recognise(tensors, source).has_decoder:
        pixels = PixelsConfig(norm_pix=config.get("norm_pix_loss", True))
        masker = Masker(UniformMaskingConfig(), trained.mask_ratio, None, trained.patch_size, 0)
        decoding = Decoding(trained, pixels, masker)
    grid = encoder_of(trained.encoder).grid
    return Encoder(
        trained.encoder,
        image_size=(grid[0] * trained.patch_size[0], grid[1] * trained.patch_size[1]),
        mean=mean,
        std=std,
        reading=Reading.of_settings(values, mean),
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


def _of_timms_export(file: Path, config: dict[str, Any]) -> Encoder:
    """The model of an export, `etpp export --to timm` or timm's own."""
    # Older exports of timm have one level.
    described: dict[str, Any] = dict(config.get("pretrained_cfg") or config)
    args = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    if "input_size" in described:
        args.setdefault("in_chans", described["input_size"][0])
    tensors, name = read_state_dict(file), str(config["architecture"])
    net = _new_net(name, pretrained_cfg=described, **args)
    pool_class_tokens(net, config.get("class_tokens"))
    net.load_state_dict(load_weights(net.state_dict(), tensors, repr(str(file))))
    origin, values = f"export {str(file.parent)!r}", config.get("values", {})
    return _described_by_timm(net, origin, classes=config.get("label_names"), values=values)


def _of_timms_file(file: Path, name: str) -> Encoder:
    """A file as the weights of a named model of timm, at that model's size and without a head."""
    if not timm.is_model(name.split(".")[0]):
        hint = close_names(name, timm.list_models(), timm.is_model)
        raise UserError(f"model is {shown(name)}, and timm has no model of that name{hint}")
    notes: list[str] = []
    source = repr(str(file))
    net = _new_net(name, num_classes=0)
    weights = in_timm_names(read_state_dict(file, notes), source, net.state_dict().keys())
    first = weights.tensors.get(f"{net.default_cfg['first_conv']}.weight")
    if first is not None and first.ndim == 4:
        net = _new_net(name, num_classes=0, in_chans=first.shape[1])
    try:
        tensors, changes = adapt_classifier(weights, net, source, keep_head=False)
    except UserError as error:
        raise UserError(f"{error}; model is {name!r}") from error
    net.load_state_dict(tensors)
    lines = (f"{source} is {weights.layout}", *notes, *changes)
    return _described_by_timm(net, f"weights {source}", notes=lines)


def _of_timms_name(name: str, *, pretrained: bool) -> Encoder:
    """A model of timm without its head, with its weights or with random ones."""
    if not timm.is_model(name.split(".")[0]):
        fits = timm.is_model_pretrained if pretrained else timm.is_model
        raise UserError(
            f"{shown(name, 300)} does not exist, and timm has no model of that name"
            f"{close_names(name, timm.list_models(), fits)}"
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


def _new_net(name: str, **args: Any) -> Any:
    """timm's model of a name; one that resamples its positions runs at any size that it can take.

    One that can be pre-trained does so in `etpp_ssl.evaluation.feature_maps`, as in pre-training.
    """
    switch = {} if is_maskable(name) else size_switch(name)
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name, **{**args, **switch})
    make_resizable(net)
    return net


def _described_by_timm(
    net: Any,
    origin: str,
    *,
    classes: list[str] | None = None,
    notes: Iterable[str] = (),
    values: dict[str, Any] | None = None,
) -> Encoder:
    """With the size, normalisation and crop that timm's `pretrained_cfg` states, and our own `values`."""
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
        reading=Reading.of_settings(values or {}, mean),
        classes=classes,
        origin=origin,
        notes=(*notes, *assumed, *((f"{resized}; here it is bicubic, center",) if own_way else ())),
    )


def _statistics(
    in_chans: int, config: dict[str, Any]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Mean and standard deviation per channel, and a note if they had to be assumed."""
    mean, std = config.get("image_mean"), config.get("image_std")
    if mean and std and len(mean) == len(std) == in_chans:
        return tuple(mean), tuple(std), ()
    mean, std = default_statistics(in_chans)
    return mean, std, (f"nothing tells the normalisation: mean {list(mean)} and std {list(std)} are assumed",)
