"""The files of an evaluation: numbers, matrix as CSV, matrix as a picture that can be read."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.report.confusion import check_evaluation_place, confusion_figure, write_evaluation

pytestmark = [
    pytest.mark.filterwarnings("error::UserWarning"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]

CONFUSION = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
NAMES = ["a, b", 'the "quoted"', "日本 $x$"]
IMAGES = {"data": "folder", "root": "/images/val", "split": "eval", "num_images": 8, "trained_on": 0}


@dataclass(frozen=True)
class Result:
    confusion: Tensor
    num_images: int = 8
    top1: float = 62.5
    recall: tuple[float | None, ...] = (75.0, None, 50.0)
    macro_top1: float = 62.5

    def numbers(self) -> dict[str, float | int | None]:
        return {"top1": self.top1, "top5": None, "num_images": self.num_images}


def test_the_files_hold_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "report" / "evaluation" / "eval"
    write_evaluation(folder, Result(CONFUSION), NAMES, {"step": 7, "split": "eval"}, IMAGES)
    assert sorted(file.name for file in folder.iterdir()) == [
        "confusion.csv",
        "confusion.png",
        "evaluation.json",
    ]
    values = json.loads((folder / "evaluation.json").read_text())
    assert values["protocol"] == {"step": 7, "split": "eval"}
    assert values["data"] == IMAGES
    assert values["numbers"] == {"top1": 62.5, "top5": None, "num_images": 8}
    assert values["classes"] == [
        {"name": NAMES[0], "num_images": 4, "recall": 75.0},
        {"name": NAMES[1], "num_images": 0, "recall": None},
        {"name": NAMES[2], "num_images": 4, "recall": 50.0},
    ]
    with (folder / "confusion.csv").open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    assert header[1:] == NAMES == [row[0] for row in rows]
    assert torch.equal(torch.tensor([[int(cell) for cell in row[1:]] for row in rows]), CONFUSION)
    with Image.open(folder / "confusion.png") as picture:
        assert min(picture.size) > 400


def test_an_evaluation_replaces_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "report" / "evaluation"
    write_evaluation(folder, Result(CONFUSION), NAMES, {"step": 7}, IMAGES)
    (folder / "old").touch()
    write_evaluation(folder, Result(CONFUSION), NAMES, {"step": 8}, IMAGES)
    assert json.loads((folder / "evaluation.json").read_text())["protocol"] == {"step": 8}
    assert [path.name for path in folder.parent.iterdir()] == ["evaluation"]
    assert not (folder / "old").exists()


def test_outputs_without_a_class_get_a_number_and_too_many_names_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    write_evaluation(folder, Result(CONFUSION), NAMES[:2], {}, IMAGES)
    header = (folder / "confusion.csv").read_text().splitlines()[0]
    assert header.endswith(",class 2")
    with pytest.raises(UserError, match="4 class names for 3 outputs"):
        write_evaluation(folder, Result(CONFUSION), [*NAMES, "more"], {}, IMAGES)


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "report").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_evaluation(tmp_path / "report" / "evaluation", Result(CONFUSION), NAMES, {}, IMAGES)


def test_a_json_file_holds_the_numbers_and_something_else_is_not_replaced(tmp_path: Path) -> None:
    file = check_evaluation_place(tmp_path / "numbers.json")
    write_evaluation(file, Result(CONFUSION), NAMES, {"step": 7}, IMAGES)
    assert json.loads(file.read_text())["numbers"]["top1"] == 62.5
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    with pytest.raises(UserError, match="not an earlier result"):
        check_evaluation_place(tmp_path)
    write_evaluation(tmp_path / "folder", Result(CONFUSION), NAMES, {"step": 7}, IMAGES)
    assert check_evaluation_place(tmp_path / "folder") == tmp_path / "folder"


def test_colours_are_shares_of_the_true_class_and_rows_without_images_are_grey() -> None:
    axes = confusion_figure(CONFUSION.numpy(), NAMES, "title").axes[0]
    (image,) = axes.images
    shares = np.ma.getdata(image.get_array())
    assert shares[[0, 2]].tolist() == [[75, 25, 0], [50, 0, 50]]
    assert np.ma.getmaskarray(image.get_array()).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert to_hex(image.cmap.get_bad()) == "#e0e0e0"
    assert [text.get_text() for text in axes.texts] == [str(n) for n in CONFUSION.flatten().tolist()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert axes.get_title(loc="left") == "title"


@pytest.mark.parametrize("count", [1, 2, 20, 21, 100, 101])
def test_counts_and_names_are_shown_where_there_is_room(count: int) -> None:
    names = [f"{index} of a very long name that goes on" for index in range(count)]
    figure = confusion_figure(np.eye(count, dtype=np.int64), names, "")
    axes = figure.axes[0]
    assert len(axes.texts) == (count**2 if count <= 20 else 0)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    if count > 100:
        # Ticks beyond the ends exist, but are not drawn.
        assert all(label.lstrip("−").isdigit() for label in labels)
        assert len(labels) < 15
        return
    assert labels == [name[:23] + "…" for name in names]
    assert labels == [label.get_text() for label in axes.get_xticklabels()]
    inches = axes.get_position().height * figure.get_figheight()
    assert inches * 72 / count > axes.get_yticklabels()[0].get_fontsize(), "names overlap"


def test_a_name_that_the_font_lacks_is_a_number_and_others_are_not_formulas() -> None:
    axes = confusion_figure(CONFUSION.numpy(), ["日本", "a $x$", "two\nlines"], "").axes[0]
    labels = axes.get_xticklabels()
    assert [label.get_text() for label in labels] == ["class 0", "a $x$", "two lines"]
    assert not any(label.get_parse_math() for label in labels)


def test_a_thousand_classes_are_drawn(tmp_path: Path) -> None:
    confusion = torch.eye(1000, dtype=torch.int64) * 50
    result = Result(confusion, 50_000, 100.0, (100.0,) * 1000)
    folder = tmp_path / "evaluation"
    write_evaluation(folder, result, [f"n{index:08d}" for index in range(1000)], {}, IMAGES)
    with Image.open(folder / "confusion.png") as picture:
        assert max(picture.size) < 2500
        # The diagonal has dark dots: nearest neighbours leave out no class.
        dark = np.asarray(picture.convert("L"))[:, : picture.width * 9 // 10] < 80
    assert dark.any(axis=1).sum() > 1900
