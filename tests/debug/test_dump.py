"""Dumps: what stays, what a full disk costs, and what is refused when one is read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import watched
from safetensors.torch import load_file, save_file
from spoilt_steps import poisoned
from torch import Tensor

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.debug.reproduce import reproduce
from etpp_ssl.recipe import Recipe
from etpp_ssl.train import dump as dump_module
from etpp_ssl.train.launch import pretrain


def test_the_newest_dumps_stay(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with watched(dumps_at=(1, 2, 4, 5, 7)) as seen, pytest.raises(KeyboardInterrupt):
        pretrain(tiny_recipe())
    assert len(seen.dumps) == 5
    kept = sorted(dump.name for dump in (tmp_path / "run/dumps").iterdir())
    assert kept == ["step-00000005", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("place", ["save_tensors", "rename"])
def test_a_full_disk_costs_the_dump_alone(
    place: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **others: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *((dump_module, "save_tensors") if place == "save_tensors" else (Path, "rename")), fail
    )
    with poisoned(4):
        run = pretrain(tiny_recipe("nonfinite.policy=skip"))
    assert run.state.num_skipped == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: step 5 is not finite, but no dump of it was written: ")
    assert list((tmp_path / "run/dumps").iterdir()) == []


def test_names_cannot_act_on_a_terminal() -> None:
    assert dump_module.escaped("a\n\x1b[2Jb\udcff é") == "a\\n\\x1b[2Jb\\udcff é"


SOUND = """
output: unused
image_size: [16, 24]
budget_epochs: 2
batch_size: 10
precision: fp32
data: {name: synthetic, num_images: 32, num_workers: 0}
curriculum: {name: constant}
model: {name: vit, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2,
        decoder: {embed_dim: 8, depth: 1, num_heads: 2}}
"""


@pytest.fixture(scope="module")
def sound_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sound") / "run"
    with watched(dumps_at=(1,)) as seen, pytest.raises(KeyboardInterrupt):
        pretrain(Recipe.parse(SOUND, [f"output={run}"]))
    dump = seen.dumps[1]
    assert dump is not None
    return dump


def in_json(file: str, **changed: Any) -> Callable[[Path], None]:
    def damage(dump: Path) -> None:
        values = json.loads((dump / file).read_text())
        place = values["micro_batches"][0] if "micro_batches" in values else values
        place.update(changed)
        (dump / file).write_text(json.dumps(values))

    return damage


def in_tensors(file: str, **changed: Tensor | None) -> Callable[[Path], None]:
    def damage(dump: Path) -> None:
        tensors = load_file(dump / file)
        tensors.update({name.replace("_", ".", 1): value for name, value in changed.items()})
        save_file({name: value for name, value in tensors.items() if value is not None}, dump / file)

    return damage


def cut(file: str) -> Callable[[Path], None]:
    return lambda dump: os.truncate(dump / file, (dump / file).stat().st_size // 2)


def text(file: str, content: str) -> Callable[[Path], None]:
    return lambda dump: (dump / file).write_text(content) and None


RANK, META = "rank-0.safetensors", "rank-0.json"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no record": (lambda dump: (dump / "dump.json").unlink(), "is not a dump of a step that is not finite"),
    "no recipe": (lambda dump: (dump / "recipe.yaml").unlink(), "does not exist"),
    "no weights": (lambda dump: (dump / "model.safetensors").unlink(), "model.safetensors' cannot be read"),
    "no part": (lambda dump: (dump / RANK).unlink(), "rank-0.safetensors' cannot be read"),
    "a part too few": (in_json("dump.json", num_processes=2), "rank-1.safetensors' cannot be read"),
    "cut weights": (cut("model.safetensors"), "model.safetensors' cannot be read"),
    "cut images": (cut(RANK), "rank-0.safetensors' cannot be read"),
    "cut record": (cut("dump.json"), "dump.json' is damaged"),
    "cut requests": (cut(META), "rank-0.json' is damaged"),
    "a pickle": (
        lambda dump: torch.save({}, dump / "model.safetensors"), "model.safetensors' cannot be read"
    ),
    "deep JSON": (text(META, "[" * 100_000), "rank-0.json' is damaged"),
    "another record": (text("dump.json", "[1]"), "dump.json' is damaged"),
    "another format": (in_json("dump.json", format=2), "format is 2"),
    "no number": (in_json("dump.json", lr="fast"), "lr is 'fast'"),
    "a surplus key": (in_json(META, lambda_=1), "unknown key"),
    "a bandwidth beyond the images": (in_json(META, bandwidth=[1024, 1024]), "does not suit the recipe's"),
    "a bandwidth between patches": (in_json(META, bandwidth=[8, 11]), "must be a multiple of 4"),
    "negative bandwidth": (in_json(META, bandwidth=[-8, 12]), "does not suit the recipe's model"),
    "a bandwidth of one axis": (in_json(META, bandwidth=[8]), "is damaged"),
    "fewer names than images": (in_json(META, names=["a"]), "has 10 images, but 1 names are recorded"),
    "no images": (in_tensors(RANK, **{"0_images": None}), "lacks 0.images"),
    "float images": (in_tensors(RANK, **{"0_images": torch.zeros(10, 3, 16, 24)}), "instead of uint8"),
    "other channels": (
        in_tensors(RANK, **{"0_images": torch.zeros(10, 1, 16, 24, dtype=torch.uint8)}), "has 1 channels"
    ),
    "short labels": (in_tensors(RANK, **{"0_labels": torch.zeros(9, dtype=torch.int64)}), "its labels are"),
    "other weights": (
        in_tensors("model.safetensors", **{"decoder.norm.bias": torch.zeros(9)}), "is of another model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_dump_is_one_sentence(damage: str, sound_dump: Path, tmp_path: Path) -> None:
    act, told = DAMAGE[damage]
    dump = shutil.copytree(sound_dump, tmp_path / "dump")
    act(dump)
    with pytest.raises(UserError, match=re.escape(told)):
        reproduce(dump)


def test_overrides_that_do_not_fit_are_one_sentence(sound_dump: Path) -> None:
    for override, told in {
        "model.embed_dim=32": "is of another model",
        "in_chans=1": "has 3 channels, but in_chans is 1",
        "precision=fp16": "needs a GPU",
        "model.depht=3": "did you mean 'depth'",
    }.items():
        with pytest.raises(UserError, match=re.escape(told)):
            reproduce(sound_dump, [override])
    with pytest.raises(UserError, match="is not a dump of a step that is not finite: it is not a folder"):
        reproduce(sound_dump / "dump.json")


def test_the_command_refuses_what_is_no_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["replay-nan", str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"etpp: error: {str(tmp_path)!r} is not a dump of a step that is not finite: it has no dump.json\n"
    )
