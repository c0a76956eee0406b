"""An ONNX file gives torch's outputs in onnxruntime, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import etpp_ssl.export.onnx as exporter
from etpp_ssl.config import UserError
from etpp_ssl.data.formats.base import Reading
from etpp_ssl.encoder import Encoder
from etpp_ssl.export.onnx import export_onnx

CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}


def vit(**described: Any) -> Encoder:
    """One block, of 2 channels and 16 x 24 px."""
    args = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args)
    return Encoder(net, image_size=(16, 24), mean=(0.4, 0.5), std=(0.2, 0.3), **described)


def outputs(file: Path, images: Tensor) -> Tensor:
    """What onnxruntime makes of images."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.fixture(autouse=True)
def _libraries() -> None:
    for name in exporter.LIBRARIES:
        pytest.importorskip(name, reason=f"{name} is not installed")


def test_raw_values_are_normalised_in_the_graph(tmp_path: Path) -> None:
    """Equal to what `embed` makes of the same deep array, values without data included."""
    encoder = vit(reading=Reading(2, range=((-100.0, 3000.0), (0.0, 1.0)), fill=(0.4, 0.5)), crop_pct=1.0)
    written = export_onnx(encoder, tmp_path / "model.onnx", normalise=True, pool="avg")
    assert written.shape == ("N", 2, 16, 24)
    assert written.difference <= 1e-5
    draw = np.random.default_rng(0)
    image = np.stack([draw.uniform(-100, 3000, (16, 24)), draw.uniform(0, 1, (16, 24))], -1).astype("float32")
    raw = torch.from_numpy(image).permute(2, 0, 1)[None]
    found = outputs(written.file, raw.repeat(5, 1, 1, 1))
    expected = encoder.embed(image, pool="avg")
    torch.testing.assert_close(found, expected.repeat(5, 1), rtol=0, atol=1e-4)


def test_a_convolutional_classifier_takes_any_size(tmp_path: Path) -> None:
    net = timm.create_model("convnext_atto", num_classes=3, **CONVNEXT)
    encoder = Encoder(net, image_size=(64, 96), mean=(0.5,) * 3, std=(0.2,) * 3)
    written = export_onnx(encoder, tmp_path / "model.onnx", dynamic_size=True)
    assert written.shape == ("N", 3, "H", "W")
    images = torch.randn(1, 3, 160, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(outputs(written.file, images), net(images), rtol=0, atol=1e-4)


class _Unknown(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.linalg.eigvals(images).abs()


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"opset": 11}, "--opset is 11"),
        ({"dynamic_size": True}, "tied to that size"),
        ({"out": "model.bin"}, "ends in .onnx"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, wanted: dict[str, Any], told: str) -> None:
    out = tmp_path / wanted.pop("out", "model.onnx")
    with pytest.raises(UserError, match=told):
        export_onnx(vit(), out, **wanted)
    assert not any(tmp_path.iterdir())


def test_an_operation_without_a_translation_is_named(tmp_path: Path) -> None:
    images = torch.eye(4)[None, None]
    with pytest.raises(UserError, match=r"linalg_eigvals|linalg_eig|_linalg"):
        exporter._write(_Unknown().eval(), images, tmp_path / "model.onnx", {}, 18)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LIBRARIES", ("onnx", "no_such_runtime"))
    with pytest.raises(UserError, match=r"no_such_runtime.*etpp-ssl\[onnx\]"):
        export_onnx(vit(), tmp_path / "model.onnx")


def test_a_file_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "_write", lambda graph, images, file, dims, opset: file.touch())
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(exporter, "_difference", lambda *_, value=difference: value)
        with pytest.raises(UserError, match="differ from torch's"):
            export_onnx(vit(), tmp_path / "model.onnx")
        assert not any(tmp_path.iterdir())
