"""Weights as the start of another model: every rule, told in a line, and every refusal."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from published_layouts import StateDict, published_classifier, published_encoder, published_mae
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.nn import functional as F

from etpp_ssl.config import UserError
from etpp_ssl.export.official import official_names
from etpp_ssl.model.mae import MaskedAutoencoder, ModelConfig
from etpp_ssl.model.pos_embed import sincos_pos_embed
from etpp_ssl.weights.layouts import Weights, recognise
from etpp_ssl.weights.loading import adapt_weights
from etpp_ssl.weights.official import load_official_mae
from etpp_ssl.weights.tensors import UNSET_POSITIONS, adapt_channels


def make_model(
    *, size: tuple[int, int] = (16, 16), in_chans: int = 3, num_values: int | None = None, **changes: Any
) -> MaskedAutoencoder:
    """The model of `published_mae`'s sizes, with other weights."""
    dims: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 4}
    decoder = {"embed_dim": 32, "depth": 1, "num_heads": 16}
    config = ModelConfig(**{"name": "vit", **dims, "decoder": decoder, **changes})
    patch = config.resolved_patch(size, in_chans)
    torch.manual_seed(9)
    values = patch[0] * patch[1] * in_chans if num_values is None else num_values
    return config.build(image_size=size, in_chans=in_chans, num_values=values)


def start(
    model: MaskedAutoencoder, state: StateDict | Weights, **known: Any
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The adapted state dict, which the model takes, and the lines that tell of it."""
    weights = state if isinstance(state, Weights) else recognise(state)
    adapted, notes = adapt_weights(replace(weights, **known), model, "init 'x.pth'")
    model.load_state_dict(adapted)
    return adapted, notes


def test_the_same_model_takes_everything_and_has_nothing_to_tell() -> None:
    state = published_mae()
    model = make_model()
    _, notes = start(model, state)
    assert notes == []
    official = official_names(model)
    assert all(torch.equal(official[name], value) for name, value in state.items())


def test_a_model_of_parallel_blocks_starts_from_its_own_kind() -> None:
    parallel = {"name": "vit_small_patch16_18x2_224", "depth": 1}
    weights = Weights(dict(make_model(**parallel).state_dict()), "a run", num_heads=4)
    assert start(make_model(**parallel), weights)[1] == []


def test_one_channel_answers_a_grey_image_as_before() -> None:
    weight = torch.randn(8, 5, 3, 2, dtype=torch.float64)
    grey = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(grey, adapt_channels(weight, 1)), F.conv2d(grey.repeat(1, 5, 1, 1), weight)
    )


@pytest.mark.parametrize(("old", "new"), [(1, 4), (3, 2), (3, 5), (3, 7)])
def test_channels_are_repeated_in_turn_and_scaled(old: int, new: int) -> None:
    weight = torch.randn(4, old, 2, 3)
    adapted = adapt_channels(weight, new)
    for channel in range(new):
        torch.testing.assert_close(adapted[:, channel], weight[:, channel % old] * old / new)
    assert torch.equal(adapt_channels(weight, old), weight)


def test_channels_without_a_rule_are_refused() -> None:
    with pytest.raises(UserError, match=r"init 'x\.pth': in_chans is 4, but the weights are for 6 channels"):
        start(make_model(in_chans=4), published_mae(in_chans=6))


def test_other_channels_keep_the_decoder_but_for_its_last_projection() -> None:
    model = make_model(in_chans=5)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    state = published_mae()
    adapted, notes = start(model, state)
    assert notes == [
        "the decoder's last projection is initialised anew: 80 values per patch, not 48",
        "the patch projection's 3 channels are repeated in turn and scaled for 5",
    ]
    assert torch.equal(adapted["decoder.head.weight"], fresh["decoder.head.weight"])
    assert torch.equal(adapted["decoder.mask_token"], state["mask_token"])
    assert torch.equal(
        adapted["encoder.patch_embed.proj.weight"], adapt_channels(state["patch_embed.proj.weight"], 5)
    )


def test_sin_cos_positions_are_those_of_the_new_resolution_or_of_the_old_scene() -> None:
    state = published_mae(grid=(4, 4))
    model = make_model(size=(12, 28))
    fresh = model.encoder.pos_embed.clone()
    assert start(model, state)[1] == [
        "the sin-cos positions count 3x7 patches, not 4x4; "
        "model.position_grid=[4, 4] keeps the places that the weights know"
    ]
    assert torch.equal(model.encoder.pos_embed, fresh)
    kept = make_model(size=(16, 24), position_grid=(4, 4))
    assert start(kept, state)[1] == []
    table = sincos_pos_embed((4, 6), (4, 4), 64)
    assert torch.equal(kept.encoder.pos_embed[0, 1:], table)
    # A stage shows fewer patches of the same scene; at the old grid its places are the old ones.
    images, ids_keep = torch.randn(2, 3, 16, 16), torch.tensor([[0, 5, 6], [1, 9, 15]])
    old = make_model()
    start(old, state)
    assert torch.equal(kept(images, ids_keep).values_BMV, old(images, ids_keep).values_BMV)


def test_learned_positions_are_resampled_from_their_own_grid() -> None:
    # 3 x 12 positions are as many as 6 x 6: the old grid counts, not the square root.
    state = published_encoder(grid=(3, 12), learned=True)
    model = make_model(size=(20, 24), pos_embed="learned")
    _, notes = start(model, state, image_size=(12, 48))
    expected = resample_abs_pos_embed(state["pos_embed"], [5, 6], [3, 12], num_prefix_tokens=1)
    assert torch.equal(model.encoder.pos_embed, expected)
    assert "the learned positions are resampled from 3x12 to 5x6 patches" in notes
    assert "the decoder is initialised anew: init has none" in notes


def test_a_sin_cos_table_tells_its_grid_to_a_model_that_learns() -> None:
    state = published_encoder(grid=(4, 9))
    model = make_model(size=(24, 24), pos_embed="learned")
    start(model, state)
    assert torch.equal(model.encoder.pos_embed[0, 1:], sincos_pos_embed((6, 6), (4, 9), 64))
    assert not model.encoder.pos_embed[0, 0].any()


def test_learned_positions_are_a_squares_only_where_nothing_else_can_be() -> None:
    square = published_encoder(grid=(6, 6), learned=True)
    model = make_model(size=(12, 16), pos_embed="learned")
    start(model, square)
    expected = resample_abs_pos_embed(square["pos_embed"], [3, 4], [6, 6], num_prefix_tokens=1)
    assert torch.equal(model.encoder.pos_embed, expected)
    with pytest.raises(UserError, match="has 36 learned positions and nothing says of which grid"):
        start(make_model(size=(16, 36), pos_embed="learned"), square)
    with pytest.raises(UserError, match="has 15 learned positions and nothing says of which grid"):
        start(model, published_encoder(grid=(3, 5), learned=True))
    with pytest.raises(UserError, match="has 36 positions, but its config says 5x7 patches"):
        start(model, square, image_size=(20, 28))
    # As many as the model has, and no square: its own grid.
    start(make_model(size=(12, 20), pos_embed="learned"), published_encoder(grid=(3, 5), learned=True))


def test_learned_positions_are_not_thrown_away_in_silence() -> None:
    with pytest.raises(UserError, match=r"would throw away; use model\.pos_embed=learned"):
        start(make_model(), published_encoder(learned=True))


def test_another_patch_size_resamples_the_projection() -> None:
    state = published_mae()
    model = make_model(size=(24, 24), patch_size=[6, 8])
    _, notes = start(model, state)
    expected = resample_patch_embed(state["patch_embed.proj.weight"], [6, 8])
    assert torch.equal(model.encoder.patch_embed.proj.weight, expected)
    assert "the patch projection is resampled from 4 to 6x8 px" in notes
    assert "the decoder's last projection is initialised anew: 144 values per patch, not 48" in notes


def test_another_target_or_decoder_is_initialised_anew() -> None:
    model = make_model(num_values=108)
    _, notes = start(model, published_mae())
    assert notes == ["the decoder's last projection is initialised anew: 108 values per patch, not 48"]
    for state in (published_mae(decoder_depth=2), published_mae(decoder_width=48)):
        model = make_model()
        fresh = {name: value.clone() for name, value in model.decoder.state_dict().items()}
        _, notes = start(model, state)
        assert notes == ["the decoder is initialised anew: its own is of another size"]
        assert all(torch.equal(value, fresh[name]) for name, value in model.decoder.state_dict().items())


def test_a_classifiers_norm_moves_in_front_of_the_decoder() -> None:
    state = published_classifier()
    model = make_model(pos_embed="learned")
    _, notes = start(model, state)
    assert torch.equal(model.encoder.norm.weight, state["fc_norm.weight"])
    assert "what follows the encoder is dropped (head.bias, head.weight)" in notes
    assert "the norm after its pooling (fc_norm) becomes the norm of every token" in notes


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_a_table_of_zeros_is_named_and_the_models_own_is_used(positions: str) -> None:
    state = published_mae()
    state |= {name: torch.zeros_like(state[name]) for name in ("pos_embed", "decoder_pos_embed")}
    model = make_model(pos_embed=positions)
    own = model.encoder.pos_embed.detach().clone()
    _, notes = start(model, state)
    assert notes == [f"its decoder's positions {UNSET_POSITIONS}", f"its positions {UNSET_POSITIONS}"]
    assert own.any()
    assert torch.equal(model.encoder.pos_embed, own)
    # In Python, where nothing says which positions are wanted, they are MAE's.
    said: list[str] = []
    official = load_official_mae(state, num_heads=4, say=said.append)
    assert torch.equal(official.encoder.pos_embed, published_mae()["pos_embed"])
    assert official.fixed_positions
    assert f"its positions {UNSET_POSITIONS}" in said


def test_half_precision_weights_are_widened() -> None:
    state = {name: value.half() for name, value in published_mae().items()}
    adapted, _ = start(make_model(in_chans=1), state)
    assert adapted["encoder.patch_embed.proj.weight"].dtype == torch.float32


def test_another_architecture_names_five_tensors_and_how_many_more() -> None:
    for state in (published_mae(width=128), published_mae(depth=3), published_mae(mlp=3)):
        with pytest.raises(UserError, match=r"^init 'x\.pth' is of another model: ") as caught:
            start(make_model(), state)
        text = str(caught.value)
        wrong, _, hint = text.partition("; the weights are those of model={name: vit, patch_size: 4, ")
        assert len(wrong.split("; ")) == 5
        assert re.search(r", and \d+ more$", wrong)
        assert hint
    with pytest.raises(UserError, match=r"encoder\.cls_token is not part of the model"):
        start(make_model(class_token=False), published_mae())
    with pytest.raises(UserError, match=r"encoder\.reg_token is missing"):
        start(make_model(reg_tokens=2), published_mae())


def test_another_number_of_heads_is_refused_where_it_is_known_and_told_where_it_is_likely() -> None:
    with pytest.raises(UserError, match=r"has 2 heads, but model\.num_heads is 4"):
        start(make_model(), published_mae(), num_heads=2)
    wide = {"embed_dim": 192, "num_heads": 6}
    _, notes = start(make_model(**wide), published_mae(width=192))
    assert any("model.num_heads is 6, but published weights of width 192 have 3" in line for line in notes)
    assert start(make_model(**wide), published_mae(width=192), num_heads=6)[1] == []
