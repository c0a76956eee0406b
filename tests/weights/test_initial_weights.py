"""`init`: a run starts from anybody's weights, and says what it made of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_layouts import published_encoder, published_mae

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.export import official, timm
from etpp_ssl.recipe import Recipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.train.launch import pretrain
from etpp_ssl.train.opening import open_run
from etpp_ssl.weights.loading import load_init
from etpp_ssl.weights.tensors import adapt_channels

PUBLISHED = "model={name: vit, patch_size: 4, embed_dim: 64, depth: 2, num_heads: 4, " + (
    "decoder: {embed_dim: 32, depth: 1, num_heads: 16}}"
)


def test_pre_training_goes_on_at_another_resolution_and_channel_count(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = published_mae(grid=(4, 4))
    torch.save({"model": state}, tmp_path / "mae.pth")
    overrides = [PUBLISHED, f"init={tmp_path / 'mae.pth'}", "image_size=[16, 32]", "in_chans=1"]
    recipe = tiny_recipe(*overrides, "curriculum=constant", "budget_epochs=0.5")
    started = open_run(recipe).bare_model.state_dict()
    assert torch.equal(started["decoder.mask_token"], state["mask_token"])
    assert torch.equal(started["encoder.blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert torch.equal(
        started["encoder.patch_embed.proj.weight"], adapt_channels(state["patch_embed.proj.weight"], 1)
    )
    said = " ".join(capfd.readouterr().err.split())
    for words in (
        "is an MAE with decoder",
        "channels are summed for 1",
        "count 4x8 patches, not 4x4",
        "16 values",
    ):
        assert words in said
    run = pretrain(recipe)
    assert all(row["loss"] < 100 for row in run.folder.metrics())

    # A finished or resumed run has its own weights, and asks for the file no more.
    (tmp_path / "mae.pth").unlink()
    assert pretrain(recipe).finished


def test_a_run_goes_on_at_another_resolution(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = pretrain(tiny_recipe("model.pos_embed=learned", "budget_epochs=0.3"))
    trained = whole.folder.checkpoints()[0].model()
    other = tiny_recipe("model.pos_embed=learned", "image_size=[24, 24]", "curriculum=constant").build_model()
    said: list[str] = []
    load_init(other, str(whole.folder.path), said.append)
    assert torch.equal(other.decoder.head.weight, trained["decoder.head.weight"])
    assert "the learned positions are resampled from 4x6 to 6x6 patches" in said
    assert said[0].endswith(f"is a run's checkpoint of step {whole.state.step}")


@pytest.mark.parametrize(
    "positions", ["model.pos_embed=learned", "model.pos_embed=sincos", "model.position_grid=[14, 3]"]
)
def test_every_export_is_a_start(positions: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    square = ("image_size=24", "curriculum=constant", positions)
    whole = pretrain(tiny_recipe(*square, "budget_epochs=0.3"))
    trained = whole.folder.checkpoints()[0].model()
    run = whole.folder.path
    exports = (
        (timm.export(run), "encoder."),
        (official.export_mae(run), ""),
        (official.export_transformers(run), ""),
    )
    for folder, prefix in exports:
        model = tiny_recipe(*square).build_model()
        said: list[str] = []
        load_init(model, str(folder), said.append)
        assert not any("positions" in line for line in said)
        same = {name for name, value in model.state_dict().items() if torch.equal(value, trained[name])}
        assert {name for name in trained if name.startswith(prefix)} <= same
    with pytest.raises(UserError, match=r"has 2 heads, but model\.num_heads is 4"):
        load_init(
            tiny_recipe(*square, "model.num_heads=4").build_model(),
            str(timm.export(whole.folder.path)),
            lambda line: None,
        )


def test_units_of_positions_that_are_given_up_are_named(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    square = ("image_size=24", "curriculum=constant")
    run = pretrain(tiny_recipe(*square, "budget_epochs=0.3", "model.position_grid=[14, 3]")).folder.path
    for source in (run, official.export_mae(run)):
        for positions, whose in (("sincos", "sin-cos"), ("learned", "decoder's")):
            said: list[str] = []
            model = tiny_recipe(*square, f"model.pos_embed={positions}").build_model()
            load_init(model, str(source), said.append)
            (line,) = (line for line in said if "positions count" in line)
            assert line.startswith(f"the {whose} positions count 6x6 patches, not 14x3; ")


def test_a_run_that_loads_nothing_of_what_its_models_name_promises_says_so(
    tiny_recipe: Callable[..., Recipe], capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = ("image_size=16", "curriculum=constant", "model.patch_size=4", "model.embed_dim=16")
    pretrain(tiny_recipe(*sizes, "model.name=vit_base_patch16_224.mae", "budget_epochs=0.3"))
    said = " ".join(capfd.readouterr().err.split())
    assert (
        "warning: model.name vit_base_patch16_224.mae names pre-trained weights, but without init none"
        in said
    )


class Payload:
    """Runs a command where an unpickler does what it is told."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_weights_that_do_not_serve_are_one_sentence_and_exit_code_2(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    tiny_recipe(PUBLISHED).save(recipe)
    files: dict[str, tuple[Any, str]] = {
        "payload": ({"model": Payload(f"touch {tmp_path / 'made'}")}, "nothing in it was run"),
        "channels": (published_mae(in_chans=6), "in_chans is 3, but the weights are for 6 channels"),
        "deeper": (published_mae(depth=3), "encoder.blocks.2.norm1.bias is not part of the model"),
        "learned": (published_encoder(learned=True), "use model.pos_embed=learned"),
        "other": ({"conv1.weight": torch.zeros(2, 2)}, "is of another architecture"),
        "head": (
            {"head.weight": torch.zeros(2, 2)},
            "holds a head (head.weight) and no encoder",
        ),
    }
    for name, (content, words) in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(SystemExit) as done:
            main(["pretrain", str(recipe), f"init={tmp_path / name}.pth"])
        assert done.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("etpp: error: init '")
        assert words in lines[0]
    (tmp_path / "texts").mkdir()
    with pytest.raises(SystemExit):
        main(["pretrain", str(recipe), f"init={tmp_path / 'texts'}"])
    assert "without recipe.yaml" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "run").exists()
    assert RunFolder(tmp_path / "run").checkpoints() == []
