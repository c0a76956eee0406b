"""Which settings the processes of one run may differ in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from etpp_ssl.config import UserError
from etpp_ssl.dist import same_start
from etpp_ssl.recipe import Recipe


@dataclass
class TwoProcesses:
    """What `agree_on_start` looks at in a run."""

    recipe: Recipe
    source: Any
    accelerator: Any = field(default_factory=lambda: SimpleNamespace(num_processes=2))
    state: Any = field(default_factory=lambda: SimpleNamespace(step=0))
    curriculum: Any = field(default_factory=lambda: SimpleNamespace(num_steps=9))
    data_fingerprint: str = "same"


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
    run: Any = TwoProcesses(tiny_recipe(), SimpleNamespace(is_stream=is_stream))
    monkeypatch.setattr(same_start, "gather_object", lambda here: [*here, {**here[0], key: value}])
    if agrees:
        same_start.agree_on_start(run)
    else:
        with pytest.raises(UserError, match=f"process 1 has opened another run than process 0: {key}"):
            same_start.agree_on_start(run)
