"""State dicts out of files that others wrote and what they wrapped them in; the check that they fit a model.

Nothing that a file says is executed, and no memory is spent that the file does not have.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from etpp_ssl.config import UserError, listed
from etpp_ssl.files import open_regular, read_text
from etpp_ssl.model.lora import merged
from etpp_ssl.run_folder import MODEL_FILE

INDEX = ".index.json"
FILES_OF_A_FOLDER = (
    MODEL_FILE,
    "model.pth",
    f"{MODEL_FILE}{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
"""What our exports, timm and transformers write; the last two are their old names."""
_ONE_OF_SEVERAL = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")
_MAX_INDEX_BYTES = 1 << 26
_OLD_PICKLES = 5
"""In an old file of torch.save: magic number, protocol, system, content, and the keys of its tensors."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "target_encoder")
"""Keys of a moving average of the weights, which is what such scripts evaluate."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "student", "encoder")
"""Keys under which training scripts keep the state dict, beside optimizer and arguments."""
_DEEPEST = 4
"""Keys above a state dict; a pickle can hold a mapping that contains itself."""

_INSIDE = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
"""What `torch.compile`, FSDP1 and activation checkpointing insert in front of whatever module they wrap."""
_COUNTER = "n_averaged"
"""Of `torch.optim.swa_utils.AveragedModel`, beside `module.*`."""


def read_state_dict(path: str | Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or a `torch.save` file, or in several under one index, on the CPU.

    The first bytes of a file tell which of the two it is; its name does not matter. A pickle is read with
    `weights_only=True`. The one class allowed beside torch's own is `argparse.Namespace`, which MAE's
    training script pickles with the weights; it holds attributes and runs no code.

    Args:
        path: the file, or the index (`*.index.json`) of several.
        notes: gets a line if a moving average is taken.

    Returns:
        Tensors by name, from the key `model`, `state_dict` or that of a moving average where there is one.
        What DistributedDataParallel, `torch.compile` and other wrappers add to names is removed. Our own
        adapters are merged.

    Raises:
        UserError: if the file is missing or damaged, claims to hold more than its size, has no tensors, has
            tensors other than plain arrays of finite numbers, or if its pickle asks for anything else.
    """
    path = Path(path)
    source = repr(str(path))
    if (part := _ONE_OF_SEVERAL.search(path.name)) and int(part[1]) > 1:
        raise UserError(f"{source} is one of {int(part[1])} files of a model; give their folder, or *{INDEX}")
    content = _read_parts(path) if path.name.endswith(INDEX) else _read_file(path)
    tensors = state_dict_in(content, source, notes)
    strange = [name for name, value in tensors.items() if not _is_plain(value)]
    if strange:
        raise UserError(
            f"{source} holds tensors that are not plain arrays in memory (sparse, quantised, complex, "
            f"without values or repeating them): {listed(strange)}"
        )
    require_finite(tensors, source)
    return merged(tensors, source)


def weights_in(folder: Path) -> Path | None:
    """The file of weights in a folder that another program wrote, or the index of several; None without."""
    return next((folder / name for name in FILES_OF_A_FOLDER if os.path.isfile(folder / name)), None)


def _read_file(path: Path) -> Any:
    try:
        with open(open_regular(path), "rb") as file:
            start = file.read(2)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(path)!r} cannot be read: {reason}") from error
    # A zip archive, or a bare pickle of protocol 2 and up, as torch wrote before 1.6.
    if start == b"PK" or start[:1] == b"\x80":
        return _load_pickle(path, archive=start == b"PK")
    return _load_safetensors(path)


def _read_parts(index: Path) -> dict[str, Any]:
    """The tensors of the files that an index names, all from its own folder."""
    try:
        parts = set(json.loads(read_text(index, _MAX_INDEX_BYTES))["weight_map"].values())
        if not parts or not all(isinstance(part, str) and Path(part).name == part for part in parts):
            raise ValueError("its weight_map does not name files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{str(index)!r} cannot be read as the index of a model's files: {reason}") from error
    tensors: dict[str, Any] = {}
    for part in sorted(parts):
        tensors |= tensors_of(_read_file(index.parent / part), [])
    return tensors


def state_dict_in(content: Any, source: str, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a loaded checkpoint, unwrapped; see `read_state_dict`.

    Args:
        content: a state dict, or a mapping that holds one; see `tensors_of`.
        source: names it in the message.
        notes: gets a line if a moving average is taken.

    Raises:
        UserError: if there is no tensor in it.
    """
    tensors = tensors_of(content, [] if notes is None else notes)
    if not tensors:
        raise UserError(
            f"{source} does not hold a state dict: no tensor at the top or under "
            f"{', '.join((*WRAPPERS, *AVERAGES))}"
        )
    return tensors


def tensors_of(content: Any, notes: list[str]) -> dict[str, Tensor]:
    """The state dict in a loaded checkpoint; empty where there is none.

    Args:
        content: a state dict, or mappings around one, under keys of `AVERAGES` and `WRAPPERS`.
        notes: gets a line if a moving average is taken.
    """
    path, tensors = _found(content, _DEEPEST)
    average = next((key for key in path if key in AVERAGES), None)
    if average is not None:
        above = content
        for key in path[: path.index(average)]:
            above = above[key]
        others = [key for key in (*AVERAGES, *WRAPPERS) if key != average and _found(above.get(key), 2)[1]]
        beside = f", not {' or '.join(map(repr, others))}" if others else ""
        notes.append(f"its moving average, {average!r}, is taken{beside}")
    return _without_inserted(tensors)


def _found(content: Any, depth: int) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The keys above the first state dict in mappings, averages first, and its tensors."""
    if not isinstance(content, Mapping) or not depth:
        return (), {}
    for key in (*AVERAGES, *WRAPPERS):
        path, tensors = _found(content.get(key), depth - 1)
        if tensors:
            return (key, *path), tensors
    return (), {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _without_inserted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrapping modules add to their names, as in `module._orig_mod.`."""
    renamed = {_INSIDE.sub(r"\1", name): value for name, value in tensors.items()}
    if len(renamed) < len(tensors):
        # Two modules of the same name: the file means something else.
        return tensors
    weights = {name: value for name, value in renamed.items() if name != _COUNTER}
    stripped = without_prefix(weights, "module.")
    return _without_inserted(stripped) if stripped and stripped.keys() != weights.keys() else renamed


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors with `prefix` removed from their names if all of them have it."""
    if all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): value for name, value in tensors.items()}
    return dict(tensors)


def load_weights(
    model_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """`tensors`, checked against a model's state dict.

    Args:
        model_state: the model's `state_dict`.
        tensors: what a file holds.
        source: names the file in the message.

    Raises:
        UserError: naming up to five tensors that are missing, unknown, or of another shape or type.
    """
    wrong = [f"{name} is missing" for name in model_state if name not in tensors]
    wrong += [f"{name} is not part of the model" for name in tensors if name not in model_state]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in model_state.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    wrong += [
        f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}"
        for name, value in model_state.items()
        if name in tensors and tensors[name].is_floating_point() != value.is_floating_point()
    ]
    if wrong:
        raise UserError(f"{source} is of another model: {listed(wrong, '; ')}")
    return dict(tensors)


def require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Check that weights are finite; a single NaN spoils every loss of a run that starts from them.

    Args:
        tensors: by name.
        source: names them in the message.

    Raises:
        UserError: naming up to five tensors that hold NaN or infinity, and how many values.
    """
    wrong = []
    for name, value in tensors.items():
        count = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if count:
            wrong.append(f"{name} ({count:,} of {value.numel():,} values)")
    if wrong:
        raise UserError(f"{source} holds NaN or infinity, and no run can start from it: {listed(wrong)}")


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense array of real numbers with all its values in the file."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_complex())
        # A view that repeats a few bytes would fill the memory in any computation.
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _check_archive(path: Path) -> None:
    """Check that a zip archive, which torch would unpack, is not larger inside; check its pickle, too.

    Raises:
        UserError: if it is, or for the pickle.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > size:
            raise UserError(
                f"{str(path)!r} claims to hold {unpacked:,} bytes in a file of {size:,}: torch.save does not "
                f"compress, so it was not written by it"
            )
        for member in members:
            if member.filename.endswith("/data.pkl"):
                _check_pickle(io.BytesIO(archive.read(member)), str(path))


def _check_old(path: Path) -> None:
    """Check the pickles of a file from before torch 1.6: several in a row, then the values."""
    with path.open("rb") as file:
        for _ in range(_OLD_PICKLES):
            try:
                _check_pickle(file, str(path))
            except UserError:
                raise
            except Exception:
                # Damaged, or with fewer pickles: torch says why it cannot be read.
                return


def _check_pickle(file: IO[bytes], path: str) -> None:
    """Refuse `bytearray(n)`, which torch executes and which fills the memory; no state dict needs it.

    Raises:
        UserError: if the pickle asks for it.
    """
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise UserError(f"{path!r} was refused and nothing in it was run: its pickle asks for bytearray")


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except Exception as error:
        # Its header can say anything, and some of it fails only in Python.
        raise UserError(
            f"{str(path)!r} is neither safetensors nor a file of torch.save: {' '.join(str(error).split())}"
        ) from error


def _load_pickle(path: Path, *, archive: bool) -> Any:
    try:
        _check_archive(path) if archive else _check_old(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"its pickle asks for {asked[1]}" if asked else "its pickle holds more than tensors"
        raise UserError(
            f"{str(path)!r} was refused and nothing in it was run: {what}; only tensors, plain values and "
            f"argparse.Namespace are read, so save the state dict alone, or as safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:
        # A damaged pickle confuses the unpickler's stack: any error is possible.
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        raise UserError(f"{str(path)!r} cannot be read as a file of torch.save: {reason}") from error
