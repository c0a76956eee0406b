"""An encoder or a classifier as one ONNX file, compared with torch before it takes its place.

Legend: N images, C channels, H, W pixels.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from etpp_ssl.config import UserError, show_size
from etpp_ssl.data.views import Normalise
from etpp_ssl.evaluation.feature_maps import map_stride
from etpp_ssl.evaluation.features import Pool, check_pool, pooled
from etpp_ssl.files import check_place, replaced_file
from etpp_ssl.messages import shown_text

if TYPE_CHECKING:
    from etpp_ssl.encoder import Encoder

TOLERANCE = 1e-4
"""Largest difference from torch, in float32, that a file may have."""
OPSETS = range(18, 24)
LIBRARIES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class OnnxFile:
    """What was written."""

    file: Path
    opset: int
    shape: tuple[int | str, ...]
    """Of the input; what is free has a name."""
    difference: float
    """Largest absolute difference of an output from torch's."""


class _Graph(nn.Module):
    """Images in; features or logits out."""

    def __init__(self, encoder: Encoder, pool: Pool | None, *, normalise: bool) -> None:
        super().__init__()
        self.net: Any = encoder.model
        self.pool = pool
        self.classifies = _classifies(encoder)
        cpu = torch.device("cpu")
        self.normalise = Normalise(encoder.mean, encoder.std, cpu, encoder.reading) if normalise else None

    def forward(self, images: Tensor) -> Tensor:
        """float32 (N, C, H, W) to (N, D), or (N, classes)."""
        if self.normalise is not None:
            images = self.normalise(images)
        if self.classifies:
            logits: Tensor = self.net(images)
            return logits
        return pooled(self.net, self.net.forward_features(images), self.pool)


def export_onnx(
    encoder: Encoder,
    out: Path,
    *,
    pool: Pool | None = None,
    normalise: bool = False,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    opset: int = 18,
) -> OnnxFile:
    """Write a file, and compare it with torch by onnxruntime at each size that it promises.

    Args:
        encoder: on the CPU. Of a classifier the logits are exported, of others the features.
        out: the file, whose name ends in .onnx.
        pool: a ViT's "token" or "avg"; None is the encoder's own.
        normalise: whether the graph takes raw values (0 to 255, or of `data.range`) and normalises them;
            otherwise it takes normalised ones.
        dynamic_batch: whether any number of images may be given, or one only.
        dynamic_size: whether other sizes may be given, of whole patches.
        opset: version of ONNX's operations.

    Raises:
        UserError: if a library is missing, the network is tied to its size, an operation cannot be exported
            (it is named), or the outputs differ by more than `TOLERANCE`, where no file is left.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--to onnx needs {' and '.join(missing)}, not installed: pip install 'etpp-ssl[onnx]'"
        )
    if opset not in OPSETS:
        raise UserError(f"--opset is {opset}; valid are {OPSETS[0]} to {OPSETS[-1]}")
    if out.suffix != ".onnx":
        raise UserError(f"--out is {str(out)!r}; the name of an ONNX file ends in .onnx")
    if _classifies(encoder) and pool is not None:
        raise UserError(f"--pool {pool} is for an encoder; a classifier has its own pooling")
    if encoder.reading.sampled:
        raise UserError(
            "data.channel_sampling averages over groups of channels outside the network: not for ONNX"
        )
    check_pool(encoder.model, pool)
    check_place(out)
    graph = _Graph(encoder, pool, normalise=normalise).eval()
    low, high = encoder.reading.bounds() if normalise else (np.float32(-1), np.float32(1))
    images = _drawn(2 if dynamic_batch else 1, encoder, encoder.image_size, low, high)
    sizes = [encoder.image_size]
    if dynamic_size:
        (height, width), (p, q) = encoder.image_size, map_stride(encoder.model)
        sizes.append((height + 2 * p, width + q))
        _check_runs(graph, encoder, sizes, low, high)
    dims: dict[int, Any] = {0: torch.export.Dim.DYNAMIC} if dynamic_batch else {}
    if dynamic_size:
        dims |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    with replaced_file(out) as aside:
        _write(graph, images, aside, dims, opset)
        number = 3 if dynamic_batch else 1
        found = [_difference(graph, aside, _drawn(number, encoder, size, low, high)) for size in sizes]
        # Python's own max passes over NaN, and so would a comparison the other way round.
        difference = float(np.max(found))
        if not difference <= TOLERANCE:
            raise UserError(
                f"the ONNX file's outputs differ from torch's by {difference:.2g}, more than {TOLERANCE:g}: "
                f"nothing is written"
            )
    batch: int | str = "N" if dynamic_batch else 1
    spatial: tuple[int | str, ...] = ("H", "W") if dynamic_size else encoder.image_size
    return OnnxFile(out, opset, (batch, encoder.in_chans, *spatial), difference)


def _classifies(encoder: Encoder) -> bool:
    # A run need not know its classes' names.
    return int(getattr(encoder.model, "num_classes", 0)) > 0


def _drawn(number: int, encoder: Encoder, size: tuple[int, int], low: Any, high: Any) -> Tensor:
    """float32 (number, C, H, W), uniform between two values, or two per channel."""
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(number, encoder.in_chans, *size, generator=draw)
    least, most = (torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1) for value in (low, high))
    return least + (most - least) * images


def _check_runs(
    graph: nn.Module, encoder: Encoder, sizes: list[tuple[int, int]], low: Any, high: Any
) -> None:
    for size in sizes:
        try:
            with torch.inference_mode():
                graph(_drawn(1, encoder, size, low, high))
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            kind, reason = type(encoder.model).__name__, str(error).split("\n")[0]
            raise UserError(
                f"--dynamic-size: the positions of a {kind} for {show_size(encoder.image_size)} px are tied "
                f"to that size: {shown_text(reason)}"
            ) from error


def _write(graph: nn.Module, images: Tensor, file: Path, dims: dict[int, Any], opset: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                (images,),
                str(file),
                dynamo=True,
                verbose=False,
                external_data=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["output"],
                dynamic_shapes=({**dims},) if dims else None,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise UserError(f"the network cannot be exported to ONNX: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The operation that has no translation, where the exporter names one; otherwise its innermost words."""
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    named = re.search(r"OpOverload\(op='([^']+)'", f"{error}\n{innermost}")
    if named:
        return f"ONNX has no operation for {named[1]}"
    return shown_text(str(innermost).strip().split("\n")[0] or type(innermost).__name__)


def _difference(graph: nn.Module, file: Path, images: Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        return float((torch.from_numpy(found) - graph(images)).abs().max())
