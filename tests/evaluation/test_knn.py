"""kNN on frozen features: the vote, the features, and the probe around them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from etpp_ssl.config import UserError
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.evaluation.base import stratified_holdout
from etpp_ssl.evaluation.features import (
    CPU_IMAGES,
    EvaluationLoader,
    extract_features,
    gather_rows,
    pooled_features,
)
from etpp_ssl.evaluation.knn import KnnProbe, knn_sweep
from etpp_ssl.recipe import Recipe
from etpp_ssl.tasks.mae import build_probe


def plain_vote(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float) -> list[int]:
    answers = []
    for row in test:
        cosines = [float(torch.cosine_similarity(row, other, dim=0)) for other in train]
        nearest = sorted(range(len(train)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = defaultdict(float)
        for i in nearest:
            votes[int(labels[i])] += math.exp(cosines[i] / temperature)
        answers.append(max(sorted(votes), key=lambda label: votes[label]))
    return answers


@pytest.mark.parametrize("block", [4, 11, 1 << 16])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (7, 1.0), (100, 0.5)])
def test_the_vote_equals_a_plain_loop(
    k: int, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etpp_ssl.evaluation.knn.BLOCK_IMAGES", block)
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(0, 4, (33,), generator=generator)
    train = torch.randn(33, 6, generator=generator) + labels[:, None]
    test = torch.randn(29, 6, generator=generator) + torch.arange(29)[:, None] % 4
    expected = plain_vote(train, labels, test, min(k, 33), temperature)
    for chunk in (1, 8, 1024):
        (predicted,) = knn_sweep(train, labels, test, num_classes=4, pairs=[(k, temperature)], chunk=chunk)
        assert predicted.tolist() == expected
    assert len(set(expected)) > 1


def test_a_small_temperature_does_not_overflow() -> None:
    train = torch.eye(3)
    (predicted,) = knn_sweep(train, torch.tensor([2, 0, 1]), train, num_classes=3, pairs=[(3, 1e-3)])
    assert predicted.tolist() == [2, 0, 1]


def setup(recipe: Recipe) -> tuple[Accelerator, Normalise]:
    accelerator = Accelerator(cpu=True)
    mean, std = recipe.data.statistics(recipe.in_chans)
    return accelerator, Normalise(mean, std, accelerator.device)


@pytest.mark.parametrize("pool", [None, "token", "avg"])
def test_features_are_timms_own_forward_in_the_order_asked(
    pool: str | None, tiny_recipe: Callable[..., Recipe]
) -> None:
    recipe = tiny_recipe()
    accelerator, normalise = setup(recipe)
    source = recipe.data.open("eval", in_chans=3, image_size=recipe.size, seed=0)
    model = recipe.build_model()
    view = EvalView(recipe.size, recipe.data.crop_pct)
    indices = [5, 0, 17, 3, 3, 22, 1]
    model.train()
    features, labels, read = extract_features(
        EvaluationLoader(accelerator=accelerator, view=view, normalise=normalise, num_workers=0),
        model.encoder,
        source,
        indices,
        pool=pool,
        batch_size=3,
    )
    assert model.encoder.training
    assert labels.tolist() == [source.label(i) for i in indices]
    assert read.tolist() == indices
    model.eval()
    pictures = [view(source.open(i), i, recipe.size) for i in indices]
    for start in (0, 3, 6):
        images = normalise(torch.stack(pictures[start : start + 3]))
        with torch.inference_mode():
            tokens = model.encoder.forward_features(images)
        expected = tokens[:, 1:].mean(1) if pool == "avg" else tokens[:, 0]
        assert torch.equal(features[start : start + 3], expected)


def test_token_pooling_without_a_cls_token_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("model.class_token=false")
    model = recipe.build_model().eval()
    images = torch.zeros(1, 3, *recipe.size)
    assert pooled_features(model.encoder, images).shape == (1, 16)
    with pytest.raises(UserError, match="no cls token"):
        pooled_features(model.encoder, images, "token")


def test_unreadable_evaluation_images_are_left_out_not_replaced(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        from PIL import Image

        Image.new("RGB", (24, 16), (40, 80, 120)).save(tmp_path / "val" / name)
    (tmp_path / "val" / "a" / "2.png").write_bytes(b"not a picture")
    recipe = tiny_recipe("data=folder", f"data.root={tmp_path / 'val'}")
    accelerator, normalise = setup(recipe)
    source = recipe.data.open("train", in_chans=3, image_size=recipe.size, seed=0)
    features, labels, read = extract_features(
        EvaluationLoader(
            accelerator=accelerator, view=EvalView(recipe.size, 1.0), normalise=normalise, num_workers=0
        ),
        recipe.build_model().encoder,
        source,
        [0, 1, 2],
        pool=None,
        batch_size=2,
    )
    assert len(features) == 2
    assert labels.tolist() == [0, 1]
    assert read.tolist() == [0, 2]


def test_the_probe_is_deterministic_beats_chance_on_separable_images_and_keeps_the_mode(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from PIL import Image

    for split, count in (("train", 12), ("val", 7)):
        for label, colour in (("blue", (20, 30, 200)), ("red", (200, 30, 20))):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noisy = tuple(min(255, c + 5 * i) for c in colour)
                Image.new("RGB", (27, 19), noisy).save(folder / f"{i}.png")
    recipe = tiny_recipe("data=folder", f"data.root={tmp_path}", "probe=knn", "probe.num_train=20")
    accelerator, normalise = setup(recipe)
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
    assert probe is not None
    torch.manual_seed(0)
    model = recipe.build_model().train()
    first = probe.run(model)
    assert model.training
    assert probe.run(model) == first
    assert first == {"knn_top1": 100.0, "knn_macro_top1": 100.0}


def test_labels_that_are_missing_or_differ_are_refused(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from PIL import Image

    for name in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/c/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 16)).save(tmp_path / name)
    recipe = tiny_recipe("data=folder", f"data.root={tmp_path}", "probe=knn")
    accelerator, normalise = setup(recipe)
    with pytest.raises(UserError, match="classes that training lacks: c; training has a, b"):
        build_probe(recipe, accelerator, normalise, recipe.build_objective())
    unlabelled = tiny_recipe("data=folder", f"data.root={tmp_path}", "probe=knn", "data.labels=none")
    with pytest.raises(UserError, match="needs labels"):
        build_probe(unlabelled, accelerator, normalise, recipe.build_objective())


def test_rows_of_one_process_are_left_alone() -> None:
    rows = torch.arange(6).view(3, 2)
    assert gather_rows(rows, Accelerator(cpu=True)) is rows


def test_a_sweep_gives_the_votes_of_its_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (33,), generator=generator)
    train = torch.randn(33, 6, generator=generator) + labels[:, None]
    test = torch.randn(29, 6, generator=generator) + torch.arange(29)[:, None] % 4
    pairs = [(k, t) for k in (7, 1, 100) for t in (0.5, 0.02)]
    swept = knn_sweep(train, labels, test, num_classes=4, pairs=pairs, chunk=8)
    for predicted, (k, temperature) in zip(swept, pairs, strict=True):
        assert predicted.tolist() == plain_vote(train, labels, test, min(k, 33), temperature)
    assert len({tuple(predicted.tolist()) for predicted in swept}) > 1


def test_a_swept_pair_is_chosen_on_the_holdout_and_evaluated_with_all_training_images(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    torch.manual_seed(0)
    lists = ["probe=knn", "probe.k=[1, 3, 30]", "probe.temperature=[0.05, 5.0]", "probe.holdout_share=0.3"]
    recipe = tiny_recipe(*lists)
    accelerator, normalise = setup(recipe)
    model = recipe.build_model()
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
    assert isinstance(probe, KnnProbe)
    result = probe.run(model)

    train, _ = probe.images.features(model, recipe.probe, probe.context, 256)
    held_out = stratified_holdout(train.labels, train.indices, 0.3, recipe.seed)
    rest, holdout = train.take(~held_out), train.take(held_out)
    best, chosen = -1.0, (0, 0.0)
    for k in (1, 3, 30):
        for temperature in (0.05, 5.0):
            predicted = plain_vote(rest.features, rest.labels, holdout.features, k, temperature)
            accuracy = 100 * sum(map(int.__eq__, predicted, holdout.labels.tolist())) / len(predicted)
            if accuracy > best:
                best, chosen = accuracy, (k, temperature)
    assert result["knn_holdout_top1"] == pytest.approx(best)
    assert (result["knn_k"], result["knn_temperature"]) == chosen
    alone = tiny_recipe("probe=knn", f"probe.k={chosen[0]}", f"probe.temperature={chosen[1]}")
    again = build_probe(alone, accelerator, normalise, alone.build_objective())
    assert again is not None
    assert again.run(model) == {key: result[key] for key in ("knn_top1", "knn_macro_top1")}


def test_features_of_a_bf16_run_are_of_bf16_unless_told_otherwise(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    recipe = tiny_recipe()
    source = recipe.data.open("eval", in_chans=3, image_size=recipe.size, seed=0)
    model = recipe.build_model()
    found = {}
    for mixed, precision in (("no", None), ("bf16", None), ("bf16", "fp32"), ("no", "bf16")):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, mixed_precision=mixed)
        found[mixed, precision] = extract_features(
            EvaluationLoader(
                accelerator=accelerator,
                view=EvalView(recipe.size, 1.0),
                normalise=Normalise(*recipe.data.statistics(3), accelerator.device),
                num_workers=0,
            ),
            model.encoder,
            source,
            list(range(5)),
            pool=None,
            batch_size=2,
            precision=precision,
        ).features
    assert all(features.dtype == torch.float32 for features in found.values())
    assert torch.equal(found["no", None], found["bf16", "fp32"])
    assert torch.equal(found["bf16", None], found["no", "bf16"])
    difference = (found["no", None] - found["bf16", None]).abs().max()
    assert 0 < difference < 0.1


def test_large_batches_are_cut_for_a_cpu_without_a_change_in_order(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    count = CPU_IMAGES + 7
    recipe = tiny_recipe(f"data.num_eval_images={count}")
    accelerator, normalise = setup(recipe)
    source = recipe.data.open("eval", in_chans=3, image_size=recipe.size, seed=0)
    model = recipe.build_model()
    order = [4, 2, 9, 7, 0, *range(10, count), 1, 3, 5, 6, 8]
    passes: list[int] = []
    model.encoder.patch_embed.register_forward_pre_hook(lambda _, images: passes.append(len(images[0])))
    found = []
    for batch_size in (count, 13):
        found.append(
            extract_features(
                EvaluationLoader(
                    accelerator=accelerator,
                    view=EvalView(recipe.size, 1.0),
                    normalise=normalise,
                    num_workers=0,
                ),
                model.encoder,
                source,
                order,
                pool=None,
                batch_size=batch_size,
            )
        )
    assert passes[:2] == [CPU_IMAGES, 7]
    assert max(passes[2:]) == 13
    torch.testing.assert_close(found[0].features, found[1].features)
    assert found[0].labels.tolist() == found[1].labels.tolist()
    assert found[0].indices.tolist() == found[1].indices.tolist() == order


def test_the_linear_probe_votes_on_its_features_as_the_knn_probe_does(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    accuracies = []
    for overrides in (["probe=knn", "probe.k=3"], ["probe=linear_cached", "probe.knn_k=3", "probe.epochs=1"]):
        recipe = tiny_recipe(*overrides, "probe.pool=avg")
        accelerator, normalise = setup(recipe)
        probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
        assert probe is not None
        torch.manual_seed(0)
        accuracies.append(probe.run(recipe.build_model())["knn_top1"])
    assert accuracies[0] == accuracies[1] > 0
