"""Runs whose steps are not finite, by the hooks of the loop and of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etpp_ssl.train.run import Run


@contextmanager
def poisoned(*steps: int, times: int | None = None) -> Iterator[None]:
    """Runs whose model is shown NaN in these steps, as no dump can know.

    Args:
        steps: counted from 0; the first cannot be spoilt.
        times: spoil a step so often, where a run meets it again; None always.
    """
    from etpp_ssl.train.loop import on_step_end

    assert min(steps) > 0
    met = dict.fromkeys(steps, 0)
    current = -1
    hooked: list[Run] = []

    def hook(run: Run) -> None:
        def spoil(model: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal current
            # Evaluations show images, too.
            if not model.training:
                return None
            if current != run.state.step:
                current = run.state.step
                if current in met:
                    met[current] += 1
            if current not in met or (times is not None and met[current] > times):
                return None
            return (arguments[0] * float("nan"), *arguments[1:])

        if run not in hooked:
            hooked.append(run)
            run.model.register_forward_pre_hook(spoil)

    on_step_end.append(hook)
    try:
        yield
    finally:
        on_step_end.remove(hook)
