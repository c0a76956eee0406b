"""The numbers of a classifier's evaluation, against plain loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.data.sources.synthetic import SyntheticConfig
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.evaluation.classification import (
    ClassificationResult,
    ClassifierEvaluation,
    EvaluateConfig,
    accuracy,
    calibration_error,
    image_rows,
    summary,
)

SIZE = (12, 18)


class Shades(nn.Module):
    """Logits that follow the mean of an image; in training mode they are another's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1.5, 1.5, num_classes))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        mean = self.dropout(images).mean(dim=(1, 2, 3))
        return -4 * (mean[:, None] - self.centres) ** 2


def evaluation(source: ImageSource, num_classes: int, **settings: int) -> ClassifierEvaluation:
    accelerator = Accelerator(cpu=True)
    return ClassifierEvaluation(
        source=source,
        view=EvalView(SIZE, 1.0),
        normalise=Normalise((0.5,) * 3, (0.25,) * 3, accelerator.device),
        accelerator=accelerator,
        num_workers=0,
        num_classes=num_classes,
        config=EvaluateConfig(**settings),  # type: ignore[arg-type]
    )


def drawn(num_images: int = 67, num_classes: int = 10) -> ImageSource:
    config = SyntheticConfig(num_eval_images=num_images, num_classes=num_classes)
    return config.open("eval", in_chans=3, image_size=SIZE, seed=0)


def plain(source: ImageSource, model: nn.Module, num_classes: int, num_bins: int) -> dict[str, object]:
    """Image after image, in Python's floats."""
    view, confusion = EvalView(SIZE, 1.0), np.zeros((num_classes, num_classes), dtype=int)
    losses, top5, bins = [], 0, [[0.0, 0.0] for _ in range(num_bins)]
    for index in range(len(source)):
        image = (view(source.open(index), 0, SIZE).float() / 255 - 0.5) / 0.25
        logits = model(image[None])[0].double().tolist()
        label = source.label(index)
        order = sorted(range(num_classes), key=lambda k: (-logits[k], k))
        total = sum(math.exp(z) for z in logits)
        confusion[label, order[0]] += 1
        top5 += label in order[:5]
        losses.append(math.log(total) - logits[label])
        confidence = math.exp(logits[order[0]]) / total
        cell = bins[min(num_bins - 1, math.ceil(confidence * num_bins) - 1)]
        cell[0] += order[0] == label
        cell[1] += confidence
    n = len(source)
    members = confusion.sum(axis=1)
    return {
        "top1": 100 * np.trace(confusion) / n,
        "macro_top1": 100 * np.mean([confusion[k, k] / members[k] for k in range(num_classes) if members[k]]),
        "top5": 100 * top5 / n,
        "loss": sum(losses) / n,
        "recall": [100 * confusion[k, k] / members[k] if members[k] else None for k in range(num_classes)],
        "calibration_error": sum(abs(right - sure) / n for right, sure in bins),
        "confusion": confusion,
    }


@pytest.mark.parametrize(("num_images", "batch_size", "num_bins"), [(67, 16, 15), (5, 256, 4), (1, 3, 1)])
def test_it_is_what_a_plain_loop_finds(num_images: int, batch_size: int, num_bins: int) -> None:
    source, model = drawn(num_images), Shades(10).eval()
    found = evaluation(source, 10, batch_size=batch_size, num_bins=num_bins).run(model)
    with torch.inference_mode():
        expected = plain(source, model, 10, num_bins)
    assert found.num_images == num_images
    assert found.top1 == pytest.approx(expected["top1"])
    assert found.macro_top1 == pytest.approx(expected["macro_top1"])
    assert found.top5 == pytest.approx(expected["top5"])
    assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert list(found.recall) == pytest.approx(expected["recall"])
    assert found.calibration_error == pytest.approx(expected["calibration_error"], abs=1e-6)
    assert np.array_equal(found.confusion.numpy(), expected["confusion"])


def test_the_models_mode_is_as_before_and_eval_inside() -> None:
    model = Shades(10).train()
    first = evaluation(drawn(), 10).run(model)
    assert model.training
    assert model.dropout.training
    assert evaluation(drawn(), 10).run(model.eval()).numbers() == first.numbers()


def rows_of(logits: list[list[float]], labels: list[int]) -> Tensor:
    return image_rows(torch.tensor(logits), torch.tensor(labels))


def test_of_equal_logits_the_lower_class_counts_first() -> None:
    rows = rows_of([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 2.0, 2.0]], [0, 2, 2])
    assert rows[:, 1].tolist() == [0, 0, 1]
    assert rows[:, 2].tolist() == [0, 2, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_no_result(value: float) -> None:
    rows = rows_of([[0.0, 1.0, 0.0], [value] * 3], [1, 1])
    with pytest.raises(UserError, match="not finite for 1 of 2 evaluation images"):
        summary(rows, 3, 15, 0)


def test_five_classes_have_no_top_five_and_an_empty_class_no_recall() -> None:
    rows = rows_of([[3.0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0]], [0, 0])
    result = summary(rows, 5, 15, 0)
    assert (result.top1, result.top5) == (50.0, None)
    assert result.recall == (50.0, None, None, None, None)
    assert result.macro_top1 == 50.0


@pytest.mark.parametrize(
    "labels", [[0, 0, 0, 0, 2, 2, 5], [1], [3, 3, 3]], ids=["uneven, with gaps", "one image", "one class"]
)
def test_macro_top1_is_the_mean_of_the_recalls_of_classes_with_images(labels: list[int]) -> None:
    correct = [index % 3 != 1 for index in range(len(labels))]
    pairs = list(zip(labels, correct, strict=True))
    recalls = [np.mean([right for label, right in pairs if label == one]) for one in sorted(set(labels))]
    found = accuracy("x_", torch.tensor(correct), torch.tensor(labels))
    assert found == pytest.approx({"x_top1": 100 * np.mean(correct), "x_macro_top1": 100 * np.mean(recalls)})


def test_a_calibrated_forecast_has_no_error_and_a_boast_all_of_it() -> None:
    confidence = torch.full((4,), 0.75, dtype=torch.float64)
    assert calibration_error(confidence, torch.tensor([True, True, True, False]), 10) == 0
    sure = torch.ones(3, dtype=torch.float64)
    assert calibration_error(sure, torch.zeros(3, dtype=torch.bool), 15) == 1


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label, shade in (("dark", 20), ("light", 230)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (20, 13), (shade,) * 3).save(tmp_path / split / label / f"{i}.png")
    (tmp_path / "val" / "dark" / "1.png").write_bytes(b"no picture")
    config = FolderConfig(root=str(tmp_path))
    source = config.open("eval", in_chans=3, image_size=SIZE, seed=0)
    result = evaluation(source, 2).run(Shades(2))
    assert (result.num_images, result.num_unreadable) == (5, 1)
    assert result.confusion.tolist() == [[2, 0], [0, 3]]
    for file in (tmp_path / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="images in a row cannot be read"):
        evaluation(source, 2).run(Shades(2))


def test_a_label_beyond_the_models_classes_is_named() -> None:
    with pytest.raises(UserError, match=r"has label 3, but model.num_classes is 3: labels are 0 to 2"):
        evaluation(drawn(num_classes=4), 3).run(Shades(3))


def test_numbers_survive_json() -> None:
    import json

    result: ClassificationResult = evaluation(drawn(7), 10).run(Shades(10))
    assert json.loads(json.dumps(result.numbers(), allow_nan=False)) == result.numbers()
