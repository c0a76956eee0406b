"""An export to MAE has exactly the original's tensors, and starts a run with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_layouts import plain_mae, published_mae, sincos_with_cls

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.export.official import decoder_config, export_mae
from etpp_ssl.recipe import Recipe
from etpp_ssl.train.launch import pretrain
from etpp_ssl.weights.official import load_official_mae

SQUARE = ("image_size=24", "curriculum=constant", "budget_epochs=0.3")


def read(folder: Path) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "model.pth", weights_only=True)
    assert list(content) == ["model"]
    state: dict[str, torch.Tensor] = content["model"]
    return state


def test_it_has_the_originals_names_and_shapes_and_its_formula_gives_our_predictions(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    run = pretrain(tiny_recipe(*SQUARE))
    folder = export_mae(run.folder.path)
    assert folder == run.folder.path / "export" / "mae"
    state = read(folder)
    published = published_mae(width=16, depth=1, grid=(6, 6), decoder_width=8)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in published.items()
    }
    for name, width in (("pos_embed", 16), ("decoder_pos_embed", 8)):
        torch.testing.assert_close(state[name], sincos_with_cls((6, 6), width), rtol=0, atol=1e-7)
    images = torch.randn(2, 3, 24, 24)
    ids_keep = torch.tensor([[0, 3, 7, 21], [5, 6, 30, 35]])
    with torch.no_grad():
        values, ids_removed = run.bare_model(images, ids_keep)
    expected = plain_mae(state, images, ids_keep, num_heads=2, decoder_heads=2)
    index = ids_removed[:, :, None].expand(-1, -1, values.shape[-1])
    torch.testing.assert_close(values, expected.gather(1, index), rtol=1e-5, atol=1e-5)


def test_out_and_in_again_is_bitwise(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe(*SQUARE))
    again = load_official_mae(
        export_mae(run.folder.path) / "model.pth", num_heads=2, decoder_num_heads=2, say=lambda line: None
    )
    trained = run.bare_model.state_dict()
    assert again.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["image_size=[16, 24]"], "square images and patches, not for image_size 16x24"),
        (["model.patch_size=[4, 6]"], "with patches of 4x6 px; use --to timm"),
        (["model.reg_tokens=1"], "no place for reg_token"),
        (["model.class_token=false"], "cls_token is missing"),
    ],
)
def test_what_the_original_has_no_place_for_is_refused(
    overrides: list[str], words: str, tiny_recipe: Callable[..., Recipe]
) -> None:
    run = pretrain(tiny_recipe(*SQUARE, *overrides))
    with pytest.raises(UserError, match=words):
        export_mae(run.folder.path)
    assert not (run.folder.path / "export").exists()


def test_a_decoder_without_a_place_stays_behind_with_a_word(tiny_recipe: Callable[..., Recipe]) -> None:
    run = pretrain(tiny_recipe(*SQUARE, "model.mlp_ratio=3"))
    said: list[str] = []
    folder = export_mae(run.folder.path, say=said.append)
    assert said == [
        "the decoder is left out: the original has one model.mlp_ratio for encoder and decoder, "
        "and its decoder's is 4"
    ]
    trained = run.bare_model.encoder.state_dict()
    assert read(folder).keys() == trained.keys()
    assert "strict=False" in (folder / "README.md").read_text()


def test_what_is_predicted_is_told_by_the_target_and_not_by_its_size(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    # As many values as the patch has: 1 cell x 3 channels x 16 bins.
    run = pretrain(tiny_recipe(*SQUARE, "target={name: hog, cell: 4, bins: 16}"))
    said: list[str] = []
    folder = export_mae(run.folder.path, say=said.append)
    assert said == [
        "the decoder is left out: it predicts 48 values per patch (target hog), not the 48 pixels"
    ]
    assert not any(name.startswith("decoder") for name in read(folder))


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_sum_of_pixels_alone_is_pixels(norm_pix: bool, tiny_recipe: Callable[..., Recipe]) -> None:
    part = f"target={{name: combined, parts: [{{name: pixels, norm_pix: {norm_pix}}}]}}".lower()
    run = pretrain(tiny_recipe(*SQUARE, part))
    card = (export_mae(run.folder.path) / "README.md").read_text()
    assert f"norm_pix_loss={norm_pix}" in card
    assert decoder_config(run.bare_model, run.recipe.target)["norm_pix_loss"] is norm_pix


@pytest.mark.parametrize(
    ("place", "words"), [("file", "is not a folder"), ("full", "holds something that is not")]
)
def test_a_place_that_is_taken_is_refused_and_an_empty_one_used(
    place: str,
    words: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "a.txt").touch()
    run = pretrain(tiny_recipe(*SQUARE, f"output={tmp_path / 'run'}"))
    with pytest.raises(UserError, match=words):
        export_mae(run.folder.path, tmp_path / place)
    monkeypatch.chdir(tmp_path / "empty")
    assert "pos_embed" in read(export_mae(run.folder.path, "."))


def test_the_command_and_its_card(
    tiny_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain(tiny_recipe(*SQUARE))
    assert exit_code(["export", str(run.folder.path), "--to", "mae", "--license", "mit"]) == 0
    assert "mae: " in capsys.readouterr().out
    card = (run.folder.path / "export" / "mae" / "README.md").read_text()
    for words in ("license: mit", "decoder_embed_dim=8", "img_size=24", "num_heads=2", "strict=True"):
        assert words in card
    assert exit_code(["export", str(run.folder.path), "--to", "mae", "--pool", "avg"]) == 2
    assert "--pool avg is for --to timm" in capsys.readouterr().err


def exit_code(arguments: list[str]) -> int:
    try:
        main(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    return 0
