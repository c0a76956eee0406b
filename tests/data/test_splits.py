"""The evaluation part that is held out of the training images."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etpp_ssl.config import UserError
from etpp_ssl.data.augment import to_tensor
from etpp_ssl.data.images import ImageSource
from etpp_ssl.data.splits import keyed_indices, open_split
from etpp_ssl.data.synthetic import SyntheticConfig


def open_part(split: str, holdout: int, num_images: int = 40, seed: int = 0) -> ImageSource:
    config = SyntheticConfig(num_images=num_images, num_eval_images=6, holdout=holdout)
    return open_split(config, split, in_chans=3, image_size=(8, 8), seed=seed)


def names(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


@pytest.mark.parametrize("holdout", [1, 13, 39])
def test_the_holdout_has_its_exact_size_and_training_never_sees_it(holdout: int) -> None:
    train, evaluation = open_part("train", holdout), open_part("eval", holdout)
    assert len(evaluation) == holdout
    assert len(train) == 40 - holdout
    everything = open_part("train", holdout=0)
    assert sorted(names(train) + names(evaluation)) == sorted(names(everything))


def test_a_held_out_image_keeps_its_picture_label_and_name() -> None:
    everything = open_part("train", holdout=0)
    number = {everything.name(index): index for index in range(len(everything))}
    for split in ("train", "eval"):
        part = open_part(split, holdout=10)
        assert part.classes == everything.classes
        for index in range(len(part)):
            original = number[part.name(index)]
            assert part.label(index) == everything.label(original)
            assert to_tensor(part.load(index)).equal(to_tensor(everything.load(original)))
            assert to_tensor(part.open(index).bands()).equal(to_tensor(everything.load(original)))


def test_the_draw_is_keyed_by_the_seed() -> None:
    assert names(open_part("eval", 10)) == names(open_part("eval", 10))
    draws = {tuple(names(open_part("eval", 10, seed=seed))) for seed in range(10)}
    assert len(draws) == 10


def test_without_a_holdout_the_sources_own_split_is_used() -> None:
    assert len(open_part("train", 0)) == 40
    evaluation = open_part("eval", 0)
    assert len(evaluation) == 6
    assert not set(names(evaluation)) & set(names(open_part("train", 0)))


def test_the_fingerprint_tells_how_many_are_held_out() -> None:
    found = {open_part(split, holdout).fingerprint() for split in ("train", "eval") for holdout in (0, 1, 9)}
    assert len(found) == 6
    assert open_part("train", 9).fingerprint() == open_part("train", 9).fingerprint()


@pytest.mark.parametrize("holdout", [40, 41])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_holdout_that_leaves_nothing_is_a_sentence(holdout: int, split: str) -> None:
    with pytest.raises(UserError) as error:
        open_part(split, holdout)
    message = str(error.value)
    assert f"data.holdout {holdout}" in message
    assert "40 images" in message


@settings(max_examples=60, deadline=None)
@given(num_images=st.integers(1, 200), count=st.integers(0, 220), seed=st.integers())
def test_a_keyed_draw_is_ascending_without_repeats_and_repeatable(
    num_images: int, count: int, seed: int
) -> None:
    drawn = keyed_indices(num_images, count, seed, "purpose")
    assert drawn == sorted(set(drawn))
    assert len(drawn) == min(count, num_images)
    assert set(drawn) <= set(range(num_images))
    assert drawn == keyed_indices(num_images, count, seed, "purpose")


def test_draws_for_different_purposes_differ_and_reach_every_image() -> None:
    assert keyed_indices(1000, 50, 0, "one") != keyed_indices(1000, 50, 0, "other")
    reached = {index for seed in range(60) for index in keyed_indices(20, 3, seed, "one")}
    assert reached == set(range(20))
