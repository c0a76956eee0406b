"""Several runs of one process, as in a notebook, do not know of each other."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from ranks import Server
from tiny_runs import TINY

from etpp_ssl import finetune, pretrain
from etpp_ssl.commands.probe import probe_run
from etpp_ssl.config import UserError
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGURG)


def process() -> dict[str, Any]:
    """What a run could leave behind in its process."""
    return {
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.benchmark,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "python": random.getstate(),
    }


def test_runs_of_any_precision_follow_each_other_and_leave_the_process_as_it_was(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    pretrain(tiny_recipe(f"output={tmp_path / 'first'}"))  # Some imports draw numbers.
    before = process()
    pretrain(tiny_recipe(f"output={tmp_path / 'bf16'}", "precision=bf16", "data.num_workers=1"))
    pretrain(tiny_recipe(f"output={tmp_path / 'deterministic'}", "deterministic=true"))
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        pretrain(tiny_recipe(f"output={tmp_path / 'fp16'}", "precision=fp16", "deterministic=true"))
    with pytest.raises(UserError, match="init 'nowhere'"):
        pretrain(tiny_recipe(f"output={tmp_path / 'init'}", "precision=bf16", "init=nowhere"))
    finetune(tiny_classifier(f"output={tmp_path / 'tuned'}", "precision=bf16"))
    probe_run(tiny_recipe(f"output={tmp_path / 'bf16'}", "probe=knn"), str(tmp_path / "bf16"), print)
    pretrain(tiny_recipe(f"output={tmp_path / 'last'}"))
    after = process()
    assert {key for key in before if before[key] != after[key]} == set()
    # Who used accelerate before still has what they asked for.
    assert mine.mixed_precision == Accelerator().mixed_precision == "bf16"
    first, last = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("first", "last"))
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_run_that_fails_leaves_the_process_to_the_next_one(
    tiny_recipe: Callable[..., Recipe], crash_after: Callable[[int], Any], tmp_path: Path
) -> None:
    pretrain(tiny_recipe(f"output={tmp_path / 'whole'}"))
    before = process()
    with crash_after(3):
        pretrain(
            tiny_recipe(
                f"output={tmp_path / 'cut'}", "precision=bf16", "deterministic=true", "tracker=tensorboard"
            )
        )
    assert {key for key, value in process().items() if value != before[key]} == set()
    pretrain(tiny_recipe(f"output={tmp_path / 'next'}"))
    whole, following = (RunFolder(tmp_path / name).checkpoints()[0].model() for name in ("whole", "next"))
    assert all(torch.equal(whole[name], following[name]) for name in whole)


TWO_RUNS = """
from etpp_ssl import Recipe, pretrain

for precision in ("fp32", "bf16"):
    overrides = [f"output={folder}/{{precision}}", f"precision={{precision}}", "budget_epochs=1"]
    pretrain(Recipe.parse({recipe!r}, overrides))
"""


def test_processes_of_one_torchrun_train_one_run_after_another(tmp_path: Path, ranks: Server) -> None:
    job = ranks.start_torchrun(None, before=TWO_RUNS.format(folder=tmp_path, recipe=TINY))
    assert job.wait() == 0, job.text
    for precision in ("fp32", "bf16"):
        assert {row["num_processes"] for row in RunFolder(tmp_path / precision).metrics()} == {2}
