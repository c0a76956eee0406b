"""Which settings the processes of one run may differ in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from etpp_ssl.config import UserError
from etpp_ssl.dist import peers
from etpp_ssl.recipe import Recipe


@pytest.mark.parametrize(
    ("key", "value", "is_stream", "agrees"),
    [
        ("data.num_workers", 3, False, True),
        ("data.num_workers", 3, True, False),
        ("data.prefetch", 9, True, True),
        ("output", "elsewhere", True, True),
        ("seed", 8, False, False),
    ],
)
def test_machines_may_differ_in_what_changes_no_sample(
    key: str,
    value: object,
    is_stream: bool,
    agrees: bool,
    tiny_recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two: Any = SimpleNamespace(num_processes=2)
    recipe, where = tiny_recipe().model_dump(), {"step": 0, "data": "same"}
    monkeypatch.setattr(peers, "gather_object", lambda here: [*here, {**here[0], key: value}])
    if agrees:
        peers.agree_on_start(two, recipe, where, is_stream=is_stream)
    else:
        with pytest.raises(UserError, match=f"process 1 has opened another run than process 0: {key}"):
            peers.agree_on_start(two, recipe, where, is_stream=is_stream)
