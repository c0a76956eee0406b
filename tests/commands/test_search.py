"""`etpp search` finds the nearest images, whatever the blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from etpp_ssl.cli import main
from etpp_ssl.commands.search import check_run, nearest
from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_find_what_a_full_sort_finds(block: int) -> None:
    draw = torch.Generator().manual_seed(0)
    features, queries = torch.randn(101, 5, generator=draw), torch.randn(3, 5, generator=draw)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], features[None], dim=2)
    expected, order = cosines.sort(dim=1, descending=True)
    values, rows = nearest(queries, features, 9, block)
    torch.testing.assert_close(values, expected[:, :9])
    assert torch.equal(rows, order[:, :9])


def test_fewer_images_than_are_wanted() -> None:
    values, rows = nearest(torch.eye(3)[:1], torch.eye(3)[:2], 8)
    assert rows.tolist() == [[0, 1]]
    assert values.tolist() == [[1.0, 0.0]]


def test_what_is_not_a_run_is_refused() -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        check_run("nowhere")


def test_an_image_of_the_folder_is_nearest_to_itself(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stopped:
            main(["search", folder, *arguments])
        return int(stopped.value.code or 0)

    folder = str(pretrain(tiny_recipe("budget_epochs=0.3")).folder.path)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(5):
        pixels = torch.randint(256, (20, 30, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(images / f"{number}.png")
    wanted, found = [str(images / "3.png"), str(images / "0.png")], tmp_path / "found.json"
    assert run(*wanted, "--in", str(images), "--count", "2", "--json", str(found)) == 0
    queries = json.loads(found.read_text())["queries"]
    assert [query["query"] for query in queries] == wanted
    first = [query["nearest"][0] for query in queries]
    assert [row["image"] for row in first] == ["3.png", "0.png"]
    assert all(row["similarity"] == pytest.approx(1, abs=1e-5) for row in first)
    assert {len(query["nearest"]) for query in queries} == {2}
    capsys.readouterr()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    for arguments, told in (
        ((str(tmp_path / "text.txt"), "--in", str(images)), "text.txt"),
        ((wanted[0], "--in", str(tmp_path / "empty")), "no image"),
    ):
        assert run(*arguments) == 2
        assert told in capsys.readouterr().err
