"""All processes of a run start from the same place, with the same recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object

from etpp_ssl.config import UserError
from etpp_ssl.train.base_run import BaseRun

OF_A_MACHINE = {"output", "data.root", "data.num_workers", "data.prefetch"}
"""Settings that machines may differ in: paths, and what their processors are good for."""


def agree_on_start(run: BaseRun) -> None:
    """See that all processes have opened the same run; every process must call it.

    Each has read folder and data for itself. File systems of several machines may show one of them an older
    state, or another folder altogether, and the processes would wait for each other for ever.

    Raises:
        UserError: on all processes, if they have not.
    """
    if run.accelerator.num_processes == 1:
        return
    # Of a stream, every data worker of every process reads its own part.
    exempt = OF_A_MACHINE - {"data.num_workers"} if run.source.is_stream else OF_A_MACHINE
    here = {
        "step": run.state.step,
        "number of steps": run.curriculum.num_steps,
        "data": run.data_fingerprint,
        **_flat(run.recipe.model_dump()),
    }
    main, *others = gather_object([here])
    for process, there in enumerate(others, 1):
        for what in [*main, *(there.keys() - main.keys())]:
            if there.get(what) != main.get(what) and what not in exempt:
                raise UserError(
                    f"process {process} has opened another run than process 0: {what} {there.get(what)!r} "
                    f"instead of {main.get(what)!r}; output {run.recipe.output!r}, recipe and data must be "
                    f"the same for all"
                )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
