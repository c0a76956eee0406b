"""Hugging Face data sets as streams: formats, columns, classes and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from stream_sources import SHARD_SIZES, png, shards_of, write_parquets

from etpp_ssl.config import UserError
from etpp_ssl.data.streams.huggingface import HuggingFaceConfig, HuggingFaceReader


def reader_of(**settings: Any) -> HuggingFaceReader:
    return HuggingFaceConfig(num_images=1, **settings).open_reader()


def write(file: Path, rows: dict[str, list[Any]], **features: Any) -> str:
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features)).data.table
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return str(file)


def test_each_file_is_a_shard_that_is_read_from_any_row_on(tmp_path: Path) -> None:
    folder = write_parquets(tmp_path / "parquet")
    reader = reader_of(path="parquet", data_files=str(folder / "*.parquet"))
    assert list(reader.names) == [str(folder / f"{place}.parquet") for place in range(len(SHARD_SIZES))]
    for shard, numbers in enumerate(shards_of(SHARD_SIZES)):
        items = list(reader.read(shard, 0))
        assert [(item.data, item.label) for item in items] == [(png(number), number) for number in numbers]
        assert [item.name for item in items] == [
            f"{reader.names[shard]} :: row {row}" for row in range(len(numbers))
        ]
        for offset in range(len(numbers) + 1):
            assert list(reader.read(shard, offset)) == items[offset:]


def test_arrow_files_and_folders_are_read_too(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = {"picture": [png(4), png(5)], "kind": [1, 0]}
    table = pyarrow.table(rows)
    with pyarrow.ipc.new_stream(tmp_path / "0.arrow", table.schema) as file:
        file.write_table(table)
    reader = reader_of(
        path="arrow", data_files=str(tmp_path / "0.arrow"), image_column="picture", label_column="kind"
    )
    assert [(item.data, item.label) for item in reader.read(0, 0)] == [(png(4), 1), (png(5), 0)]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train-0.parquet", {"image": [png(6)]}, image=datasets.Value("binary"))
    reader = reader_of(path=str(tmp_path / "set"), label_column=None)
    assert [(item.data, item.label) for item in reader.read(0, 0)] == [(png(6), -1)]
    assert (reader.classes, reader.has_labels) == (None, False)


def test_class_names_come_from_the_data(tmp_path: Path) -> None:
    file = write(
        tmp_path / "0.parquet",
        {"image": [{"bytes": png(0), "path": None}] * 2, "label": [1, -1]},
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["oak", "pine"]),
    )
    reader = reader_of(path="parquet", data_files=file)
    assert reader.classes == ["oak", "pine"]
    assert [item.label for item in reader.read(0, 0)] == [1, -1]


@pytest.mark.parametrize(
    ("values", "kind", "labels"),
    [
        (["oak", " pine ", None, ""], "string", ["oak", "pine", -1, -1]),
        (["oak", "pine"], "large_string", ["oak", "pine"]),
        ([b"oak", b"\xff"], "binary", ["oak", "\ufffd"]),
        ([1.0, 0.5], "float64", [1, -1]),
        ([True, False], "bool", [1, 0]),
        ([3, -7], "int8", [3, -1]),
    ],
)
def test_a_label_column_may_hold_names(
    values: list[Any], kind: str, labels: list[int | str], tmp_path: Path
) -> None:
    """Strings were "no label"."""
    file = write(
        tmp_path / "0.parquet",
        {"image": [png(0)] * len(values), "label": values},
        image=datasets.Value("binary"),
        label=datasets.Value(kind),
    )
    reader = reader_of(path="parquet", data_files=file)
    assert (reader.has_labels, reader.classes) == (True, None)
    assert [item.label for item in reader.read(0, 0)] == labels


def test_rows_without_an_image_are_named(tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(png(7))
    images = [
        {"bytes": None, "path": str(tmp_path / "7.png")},
        {"bytes": None, "path": str(tmp_path / "8.png")},
        None,
    ]
    file = write(tmp_path / "0.parquet", {"image": images}, image=datasets.Image())
    items = list(reader_of(path="parquet", data_files=file, label_column=None).read(0, 0))
    assert [item.data for item in items] == [png(7), b"", b""]
    assert [item.fault for item in items] == ["", *["its column image holds no image file"] * 2]


def test_wrong_names_are_one_sentence(tmp_path: Path) -> None:
    folder = write_parquets(tmp_path / "parquet")
    good = {"path": "parquet", "data_files": str(folder / "0.parquet")}
    for change, words in (
        ({"image_column": "picture"}, r"data\.image_column 'picture' is not a column .* image, label$"),
        ({"label_column": "kind"}, r"data\.label_column 'kind' is not a column .* null reads no labels"),
        ({"data_files": str(folder / "no.parquet")}, "cannot be opened by datasets"),
        ({"split": "test"}, r"data\.path 'parquet' \(split 'test'\) cannot be opened by datasets"),
        ({"path": str(tmp_path / "nowhere"), "data_files": None}, "cannot be opened by datasets"),
    ):
        with pytest.raises(UserError, match=words) as error:
            reader_of(**{**good, **change})
        assert "\n" not in str(error.value)


def test_without_the_library_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"data\.name huggingface needs .* pip install 'etpp-ssl\[stream\]'"):
        reader_of(path="parquet")
