"""`etpp search` finds the nearest images, whatever the blocks."""

from __future__ import annotations

import pytest
import torch

from etpp_ssl.commands.search import check_run, nearest
from etpp_ssl.config import UserError


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
