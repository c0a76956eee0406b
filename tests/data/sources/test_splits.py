"""The evaluation part that is held out of the training images, subsets by label, and what labels must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from etpp_ssl.commands.prepare import PrepareConfig, prepare
from etpp_ssl.config import UserError
from etpp_ssl.data.sources.base import DataConfig, ImageSource
from etpp_ssl.data.sources.folder import FileListConfig, FolderConfig
from etpp_ssl.data.sources.shards import ShardsConfig
from etpp_ssl.data.sources.splits import check_labels, keyed_indices, open_split, read_labels, with_classes
from etpp_ssl.data.sources.synthetic import SyntheticConfig, SyntheticSource
from etpp_ssl.data.sources.timm_dataset import TimmConfig
from etpp_ssl.data.views import to_tensor


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
            assert to_tensor(part.open(index).channels()).equal(
                to_tensor(everything.open(original).channels())
            )


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


def labelled(counts: dict[str, int], root: Path) -> FolderConfig:
    """Class folders with so many empty files: nothing here reads an image."""
    for name, count in counts.items():
        (root / "train" / name).mkdir(parents=True)
        for number in range(count):
            (root / "train" / name / f"{number:03d}.png").touch()
    return FolderConfig(root=str(root))


COUNTS = {"ash": 40, "elm": 4, "fir": 1, "oak": 25}


def subset(config: DataConfig, seed: int = 0, **keys: Any) -> ImageSource:
    changed = config.model_copy(update=keys)
    return open_split(changed, "train", in_chans=3, image_size=(8, 8), seed=seed)


def per_class(source: ImageSource) -> dict[str, int]:
    assert source.classes is not None
    return dict(Counter(source.classes[source.label(index)] for index in range(len(source))))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, {"ash": 40, "elm": 4, "fir": 1, "oak": 25}),
        (0.1, {"ash": 4, "elm": 1, "fir": 1, "oak": 2}),
        (0.01, {"ash": 1, "elm": 1, "fir": 1, "oak": 1}),
        (0.5, {"ash": 20, "elm": 2, "fir": 1, "oak": 12}),
    ],
)
def test_a_share_is_taken_of_each_class(share: float, expected: dict[str, int], tmp_path: Path) -> None:
    found = subset(labelled(COUNTS, tmp_path), label_share=share)
    assert per_class(found) == expected
    assert names(found) == sorted(names(found))
    assert len(set(names(found))) == len(found)


def test_k_are_taken_of_each_class_or_a_sentence_says_which_has_too_few(tmp_path: Path) -> None:
    del (counts := dict(COUNTS))["fir"]
    config = labelled(counts, tmp_path)
    for k in (1, 3, 4):
        assert per_class(subset(config, labels_per_class=k)) == {"ash": k, "elm": k, "oak": k}
    with pytest.raises(UserError, match=r"data\.labels_per_class is 5, but class 'elm' has 4 images"):
        subset(config, labels_per_class=5)


def test_smaller_subsets_lie_within_larger_ones(tmp_path: Path) -> None:
    config = labelled(COUNTS, tmp_path)
    drawn = [set(names(subset(config, label_share=share))) for share in (0.01, 0.1, 0.3, 1.0)]
    assert all(one < other for one, other in pairwise(drawn))


def test_a_subset_is_keyed_by_seed_and_class_alone(tmp_path: Path) -> None:
    config = labelled(COUNTS, tmp_path)
    first = names(subset(config, label_share=0.2))
    assert names(subset(config, label_share=0.2)) == first
    assert len({tuple(names(subset(config, seed, label_share=0.2))) for seed in range(10)}) == 10
    # Another class's images, and the order in which the file system lists them, play no part.
    other = tmp_path / "other"
    for name in reversed(first_files := sorted((tmp_path / "train").rglob("*.png"))):
        copy = other / "train" / name.relative_to(tmp_path / "train")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    assert len(first_files) == sum(COUNTS.values())
    for number in range(50, 90):
        (other / "train" / "oak" / f"{number:03d}.png").touch()
    found = names(subset(FolderConfig(root=str(other)), label_share=0.2))
    assert [name for name in found if "oak" not in name] == [name for name in first if "oak" not in name]


def test_every_image_of_a_class_can_be_drawn(tmp_path: Path) -> None:
    config = labelled({"ash": 6, "elm": 6}, tmp_path)
    drawn = Counter(name for seed in range(200) for name in names(subset(config, seed, labels_per_class=2)))
    assert len(drawn) == 12
    assert all(40 < count < 95 for count in drawn.values())


def test_a_subset_keeps_pictures_labels_and_names() -> None:
    config = SyntheticConfig(num_images=40)
    everything = subset(config)
    number = {everything.name(index): index for index in range(40)}
    part = subset(config, labels_per_class=2)
    assert part.classes == everything.classes
    assert part.all_labels().tolist() == [part.label(index) for index in range(20)]
    for index in range(20):
        original = number[part.name(index)]
        assert part.label(index) == everything.label(original)
        assert to_tensor(part.open(index).channels()).equal(to_tensor(everything.open(original).channels()))


def test_a_subset_leaves_the_holdout_and_the_evaluation_alone() -> None:
    config = SyntheticConfig(num_images=40, num_eval_images=6, holdout=10)
    held_out = open_split(config, "eval", in_chans=3, image_size=(8, 8), seed=0)
    narrow = config.model_copy(update={"labels_per_class": 1})
    assert names(open_split(narrow, "eval", in_chans=3, image_size=(8, 8), seed=0)) == names(held_out)
    found = subset(config, labels_per_class=1)
    assert len(found) == 10
    assert not set(names(found)) & set(names(held_out))
    other = config.model_copy(update={"holdout": 0, "label_share": 0.1})
    assert len(open_split(other, "eval", in_chans=3, image_size=(8, 8), seed=0)) == 6


def test_the_fingerprint_tells_subsets_apart() -> None:
    config = SyntheticConfig(num_images=40)
    found = [
        subset(config),
        subset(config, holdout=30),
        subset(config, labels_per_class=1),
        subset(config, seed=1, labels_per_class=1),
        subset(config, labels_per_class=2),
        subset(config, holdout=10, labels_per_class=1),
    ]
    assert len({source.fingerprint() for source in found}) == len(found)
    assert subset(config, label_share=0.25).fingerprint() == subset(config, labels_per_class=1).fingerprint()


class OneByOne(SyntheticConfig):
    """Synthetic images whose labels are not all known beforehand."""

    def open(self, split: str, **others: Any) -> ImageSource:
        class Source(SyntheticSource):
            def all_labels(self) -> None:
                return None

        return Source(**vars(super().open(split, **others)))


def test_labels_that_are_read_one_by_one_give_the_same_subset() -> None:
    known = names(subset(SyntheticConfig(num_images=40), label_share=0.3))
    assert names(subset(OneByOne(num_images=40), label_share=0.3)) == known


@pytest.mark.parametrize("key", ["label_share", "labels_per_class"])
def test_a_subset_of_unlabelled_images_is_a_sentence(key: str, tmp_path: Path) -> None:
    config = labelled({"ash": 4}, tmp_path)
    with pytest.raises(UserError, match=rf"data\.{key} needs labels, and the data has none"):
        subset(config, **{key: 1})


def test_the_two_ways_to_say_how_many_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match=r"label_share is 0\.1 and labels_per_class is 5: give one"):
        SyntheticConfig(label_share=0.1, labels_per_class=5)
    for bad in ({"label_share": 0}, {"label_share": 1.1}, {"labels_per_class": 0}):
        with pytest.raises(ValidationError):
            SyntheticConfig(**bad)  # type: ignore[arg-type]


class Named:
    """The part of a source that is compared."""

    def __init__(self, *classes: str, labels: list[int] | None = None) -> None:
        self.classes = list(classes) or None
        self.labels = labels

    def all_labels(self) -> np.ndarray | None:
        return None if self.labels is None else np.array(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"


def sentence_of(check: Callable[[], None]) -> str:
    with pytest.raises(UserError) as error:
        check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_evaluation_images_get_the_indices_of_training_and_may_lack_a_class(tmp_path: Path) -> None:
    """For folders and lists alike, and shards of them; a refusal of folders only in 0.5."""
    for name in ("train/ash/1.png", "train/elm/2.png", "train/oak/3.png", "val/elm/5.png", "val/oak/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (3, 2, 1)).save(tmp_path / name)
    for split in ("train", "val"):
        files = sorted(path.relative_to(tmp_path) for path in (tmp_path / split).rglob("*.png"))
        (tmp_path / f"{split}.txt").write_text("".join(f"{file}\t{file.parent.name}\n" for file in files))
    prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-shards", PrepareConfig(), lambda done, total: None)
    for config in (
        FolderConfig(root=str(tmp_path)),
        FileListConfig(file=str(tmp_path / "train.txt"), eval_file=str(tmp_path / "val.txt")),
        ShardsConfig(root=str(tmp_path.parent / f"{tmp_path.name}-shards")),
        TimmConfig(root=str(tmp_path), eval_split="val"),
    ):
        train, evaluation = (
            open_split(config, split, in_chans=3, image_size=(8, 8), seed=0) for split in ("train", "eval")
        )
        assert train.classes == ["ash", "elm", "oak"]
        known = with_classes(evaluation, train.classes)
        assert known.classes == train.classes
        labels = [known.label(index) for index in range(2)]
        assert labels == known.all_labels().tolist() == [1, 2]
        assert "no image of class ash" in known.describe()
        assert "no image" not in train.describe()
        assert len(known) == len(evaluation)
        assert [known.name(index) for index in range(2)] == [evaluation.name(index) for index in range(2)]


def test_an_evaluation_folder_of_one_class_has_its_label(tmp_path: Path) -> None:
    for name in ("train/ash", "train/elm", "val/elm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").touch()
    source = FolderConfig(root=str(tmp_path)).open("eval", in_chans=3, image_size=(8, 8), seed=0)
    assert with_classes(source, ["ash", "elm"]).all_labels().tolist() == [1]


def test_classes_that_training_lacks_are_named_five_at_most() -> None:
    def compare(ours: str, theirs: str) -> str:
        return sentence_of(lambda: with_classes(Named(*theirs), list(ours)))  # type: ignore[arg-type]

    same = Named(*"abc")
    assert with_classes(same, list("abc")) is same  # type: ignore[arg-type]
    assert compare("abc", "abcd") == (
        "the evaluation images have classes that training lacks: d; training has a, b, c"
    )
    assert "training lacks: i, j, k, l, m, and 1 more; training has a, b" in compare("ab", "aijklmn")
    assert "have no labels" in sentence_of(lambda: with_classes(Named(), ["a"]))  # type: ignore[arg-type]


def test_labels_outside_the_classes_are_named() -> None:
    def check(labels: list[int] | None, num_classes: int, *classes: str) -> None:
        check_labels(Named(*classes, labels=labels), num_classes)  # type: ignore[arg-type]

    check([0, 2, 1], 3, "a", "b", "c")
    check([0, 1], 9, "a", "b")
    check(None, 3, "a", "b")
    assert sentence_of(lambda: check([0, 2, 3, 4], 3, *"abcde")) == (
        "image 'image 2' has label 3, but model.num_classes is 3: labels are 0 to 2"
    )
    assert "'image 1' has no label" in sentence_of(lambda: check([0, -1], 3, *"abc"))
    assert "the data has none" in sentence_of(lambda: check([-1, -1], 3))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("drawn", [{}, {"labels_per_class": 5}, {"label_share": 0.3}])
def test_the_holdout_of_a_share_parts_each_class_of_what_is_trained_on(
    share: float, drawn: dict[str, Any]
) -> None:
    def part(split: str, **other: Any) -> ImageSource:
        config = SyntheticConfig(num_images=203, num_classes=7, **drawn, **other)
        return open_split(config, split, in_chans=3, image_size=(8, 12), seed=2)

    whole, rest, held = (
        part("train"),
        part("train", holdout_share=share),
        part("holdout", holdout_share=share),
    )
    assert sorted(names(rest) + names(held)) == sorted(names(whole))
    assert rest.fingerprint() != whole.fingerprint() != held.fingerprint()
    per_class = Counter(read_labels(whole, "").tolist())
    found = Counter(read_labels(held, "").tolist())
    assert found == {label: max(1, round(share * count)) for label, count in per_class.items()}
    # Another draw of training images leaves the evaluation images alone, and a data.holdout is drawn before.
    assert names(part("eval", holdout_share=share)) == names(part("eval"))
    both = [part(split, holdout_share=share, holdout=20) for split in ("train", "holdout", "eval")]
    assert len({name for source in both for name in names(source)}) == sum(map(len, both))


def test_a_class_keeps_its_only_image_from_the_holdout() -> None:
    config = SyntheticConfig(num_images=40, labels_per_class=1, holdout_share=0.5)
    with pytest.raises(UserError, match=r"holdout_share 0.5 of .* holds out none"):
        open_split(config, "train", in_chans=3, image_size=(8, 8), seed=0)
