"""`etpp plan`: every recipe, and numbers that can be computed by hand."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from etpp_ssl.config import NotAtHand
from etpp_ssl.curriculum.cost import Cost, area_share, count_cost
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.train.plan import Plan, plan_run
from etpp_ssl.train.plan_table import print_plan

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SIZES = ("micro", "tiny", "s18", "small", "50", "s36", "base", "medium", "m36", "large", "huge")
"""Of models, as recipes are called, small ones first."""


@cache
def recipe_in(path: Path) -> Recipe | FinetuneRecipe:
    return load_any(path)


def family(path: Path) -> str:
    """The same for recipes whose models are of one class and run at the same sizes, in the same stages."""
    recipe = recipe_in(path)
    model = recipe.model.model_dump()
    parts = {name: model.get(name) for name in ("decoder", "attention")}
    kind = re.sub(
        r"(?<![a-z0-9])(tiny|small|medium|base|large|huge|[sm]\d+|patch\d+)(?![a-z0-9])",
        "*",
        recipe.model.name,
    )
    target = recipe.target.name if isinstance(recipe, Recipe) else None
    parts["decoder"] = (parts["decoder"] or {}).get("name")
    return f"{recipe.task} {kind} {parts} {target} {recipe.size} {recipe.curriculum.model_dump()}"


FAMILIES: dict[str, Path] = {}
"""The recipe that is traced for each family: its smallest."""
for recipe_file in sorted(RECIPES, key=lambda path: [i for i, size in enumerate(SIZES) if size in path.stem]):
    FAMILIES.setdefault(family(recipe_file), recipe_file)


@cache
def plan_of(path: Path, *overrides: str) -> Plan:
    return plan_run(load_any(path, overrides))


def shallow(path: Path) -> list[str]:
    """Overrides that leave a plain ViT one block, and a decoder one: shares are told of fewer as well."""
    recipe = recipe_in(path)
    if isinstance(recipe, Recipe):
        return ["model.depth=1", "model.decoder.depth=1"]
    return ["model.depth=1"] if re.match("vit|deit", recipe.model.name) else []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_spends_its_budget_and_has_a_header_that_is_a_contract(path: Path) -> None:
    recipe = recipe_in(path)
    num_images = recipe.data.stated_images or len(recipe.open_split("train"))
    curriculum = recipe.build_curriculum(num_images)
    assert curriculum.equivalent_epochs == pytest.approx(recipe.budget_epochs, rel=2e-3)
    assert curriculum.stages[-1].bandwidth == recipe.size
    if path.stem.endswith("_etpp200"):
        # The supervised rows of the paper: 200 equivalent epochs against 300 at full resolution.
        assert (recipe.budget_epochs, recipe.baseline_epochs, recipe.batch_size) == (200, 300, 4096)
        images = sum(
            stage.num_steps * stage.batch_size * area_share(stage.bandwidth, recipe.size)
            for stage in curriculum.stages
        )
        assert recipe.baseline_epochs * num_images / images == pytest.approx(1.5, rel=1e-3)
        bandwidths = [stage.bandwidth[0] for stage in curriculum.stages]
        assert bandwidths in ([96, 160, 224], [96, 160, 192, 224], [160, 224])
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    commands = (f"{recipe.task} recipes/{path.name}", f"probe recipes/{path.name}")
    for words in (commands, ("# Cost:",), ("# Expected:",)):
        assert any(word in line for word in words for line in header), (
            f"{path.name}: no {words} in its header"
        )
    assert "PENDING" not in path.read_text()


@pytest.mark.parametrize("path", FAMILIES.values(), ids=lambda path: path.stem)
def test_a_recipe_of_every_family_is_planned(path: Path) -> None:
    plan = plan_of(path, *shallow(path))
    curriculum = recipe_in(path).build_curriculum(plan.num_images)
    assert [row.stage for row in plan.stages] == list(curriculum.stages)
    assert sum(stage.area_share for stage in plan.stages) == pytest.approx(1)
    assert sum(stage.flops_share for stage in plan.stages) == pytest.approx(1)
    assert plan.curriculum.equivalent_epochs == curriculum.equivalent_epochs
    images = sum(row.num_images * area_share(row.stage.bandwidth, plan.recipe.size) for row in plan.stages)
    assert plan.speedup_by_area == pytest.approx(plan.baseline_epochs * plan.num_images / images)


def test_the_paper_recipe_has_the_published_numbers() -> None:
    path = next(p for p in RECIPES if p.stem == "in1k_vit_base_etpp400")
    plan = plan_of(path)
    assert [stage.stage.bandwidth for stage in plan.stages] == [(96, 96), (160, 160), (224, 224)]
    assert [stage.columns["visible"] for stage in plan.stages] == ["9", "25", "49"]
    assert [round(stage.area_share, 3) for stage in plan.stages] == [0.2, 0.4, 0.4]
    assert plan.speedup_by_area == pytest.approx(4.0, rel=1e-3)
    assert plan.speedup_by_flops == pytest.approx(4.0, rel=0.02)
    assert "85.80 M parameters in the encoder" in plan.title
    # 909 passes over ImageNet: 2.27 times the 400 of a constant run (METHOD's images per compute).
    assert plan.curriculum.num_samples / (400 * 1_281_167) == pytest.approx(2.27, abs=0.01)


def test_bandwidths_of_patch_14_are_rounded_and_the_rounding_is_reported() -> None:
    path = next(p for p in RECIPES if p.stem == "in1k_vit_huge14_etpp")
    plan = plan_of(path, *shallow(path))
    assert [stage.stage.bandwidth[0] for stage in plan.stages] == [98, 154, 224]
    assert len(plan.notes) == 3
    assert "98" in plan.notes[0]
    assert "154" in plan.notes[1]


@pytest.mark.parametrize(
    ("override", "num_images"),
    [("data.holdout=10", 54), ("data.labels_per_class=2", 20), ("data.label_share=0.5", 34)],
)
def test_the_plan_counts_the_images_that_are_left(
    override: str, num_images: int, tiny_recipe: Callable[..., Recipe]
) -> None:
    assert plan_run(tiny_recipe(override)).num_images == num_images


def test_counted_operations_are_those_of_the_matrix_products() -> None:
    linear = torch.nn.Linear(7, 5, device="meta")
    cost = count_cost(lambda: linear(torch.zeros(3, 7, device="meta")).sum(), linear)
    # Forward and the weight's gradient; the input needs none.
    assert cost.flops == 2 * (2 * 3 * 7 * 5)
    assert cost.saved_values == 3 * 7


@pytest.mark.parametrize("shape", [(1, 7, 12), (3, 12, 5, 2)])
def test_a_count_without_computing_is_that_of_a_computation(shape: tuple[int, ...]) -> None:
    def count(device: str) -> Cost:
        with torch.device(device):
            layers = nn.Sequential(
                nn.LayerNorm(12), nn.Linear(12, 9), nn.GELU(), nn.Softmax(-1), nn.GELU("tanh")
            )
            images = torch.rand(shape, requires_grad=True)
        # Channels last: as their neighbours in memory where they are the second axis.
        return count_cost(lambda: layers(images.movedim(1, -1) if len(shape) > 3 else images).sum(), layers)

    assert count("meta") == count("cpu")
    norm = nn.LayerNorm(5, device="meta")
    with pytest.raises(RuntimeError, match=r"\[5\]"):
        count_cost(lambda: norm(torch.rand(2, 6, device="meta")).sum(), norm)


def test_the_plan_is_printed_with_its_learning_rate_and_speedup(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    out = io.StringIO()
    recipe = tiny_recipe(
        "baseline_epochs=6", "curriculum.stages=[{bandwidth: 9, share: 0.5}, {bandwidth: 16, share: 0.5}]"
    )
    print_plan(plan_run(recipe), Console(file=out, width=140))
    text = out.getvalue()
    for words in ("8x12", "16x24", "rounded to 8x12", "half-cosine", "▁", "over 6 epochs", "GB"):
        assert words in text


def test_compute_is_told_in_a_unit_that_fits_and_a_speed_up_needs_a_baseline(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    out = io.StringIO()
    plan = plan_run(tiny_recipe())
    for flops, told in ((2.5e8, "0.25 GFLOP"), (3.969e13, "39.69 TFLOP"), (4.2e18, "4.2 EFLOP")):
        print_plan(replace(plan, total_flops=int(flops)), Console(file=out, width=140))
        assert f"compute: {told}" in out.getvalue()
    assert "speed-up" not in out.getvalue()


def test_weights_that_a_name_asks_for_and_nothing_loads_are_told(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe]
) -> None:
    small = ["image_size=32", "curriculum=constant", "model.depth=1", "model.patch_size=16"]
    for build in (tiny_recipe, tiny_classifier):
        tagged = [*small, "model.name=vit_base_patch16_224.mae", "model.embed_dim=16"]
        first = plan_run(build(*tagged)).notes[0]
        assert first.startswith("warning: model.name vit_base_patch16_224.mae names pre-trained weights, but")
        assert not any("names pre-trained weights" in note for note in plan_run(build(*small)).notes)
        loaded = plan_run(build(*tagged, "init=some/weights.pth")).notes
        assert not any("names pre-trained weights" in note for note in loaded)
    out = io.StringIO()
    print_plan(plan_run(tiny_recipe(*tagged)), Console(file=out, width=300))
    assert "\nwarning: model.name vit_base_patch16_224.mae" in out.getvalue()


def test_encoder_and_decoder_are_counted_apart_and_add_up(tiny_recipe: Callable[..., Recipe]) -> None:
    plans = {
        name: plan_run(tiny_recipe(f"model.decoder={name}", "model.decoder.depth=1"))
        for name in ("mae", "cross")
    }
    columns = {name: [stage.columns for stage in plan.stages] for name, plan in plans.items()}
    for name, plan in plans.items():
        other = "cross" if name == "mae" else "mae"
        for stage in plan.stages:
            found = stage.columns
            both = float(found["encoder"]) + float(found["decoder"])
            assert both == pytest.approx(stage.cost.flops / 1e9, rel=1e-3)
            height, width = map(int, found["grid"].split("x"))
            assert int(found["visible"]) + int(found["predicted"]) == height * width
        assert f"it would be {columns[other][-1]['decoder']} with a {other} decoder" in plan.notes[-1]
    assert [row["encoder"] for row in columns["mae"]] == [row["encoder"] for row in columns["cross"]]
    assert float(columns["cross"][-1]["decoder"]) < float(columns["mae"][-1]["decoder"])


def test_a_subset_to_predict_makes_the_decoder_cheaper(tiny_recipe: Callable[..., Recipe]) -> None:
    all_, some = (
        plan_run(tiny_recipe("model.decoder=cross", *extra)).stages[-1]
        for extra in ([], ["model.decoder.predict_ratio=0.25"])
    )
    assert (all_.columns["predicted"], some.columns["predicted"]) == ("18", "6")
    assert float(some.columns["decoder"]) < 0.7 * float(all_.columns["decoder"])
    assert some.memory_bytes < all_.memory_bytes


def test_a_schedule_of_the_mask_ratio_is_planned_at_each_stages_mean(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    plan = plan_run(tiny_recipe("model.mask_ratio={start: 0.5, end: 0.75}"))
    for stage, end in zip(plan.stages, [0.2, 0.6, 1.0], strict=True):
        assert stage.stage.progress == pytest.approx(end - stage.stage.share, abs=0.02)
    # Means of 0.525, 0.6 and 0.7 over grids of 6, 12 and 24 patches.
    assert [stage.columns["visible"] for stage in plan.stages] == ["3", "5", "7"]
    constant = plan_run(tiny_recipe("model.mask_ratio=0.7"))
    assert plan.stages[-1].cost.flops == constant.stages[-1].cost.flops
    assert plan.stages[-1].memory_bytes > constant.stages[-1].memory_bytes
    assert "0.5 to 0.75" in plan.notes[-2]
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=140))
    assert "mask ratio 0.5 to 0.75" in out.getvalue()


def printed(plan: Plan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=140))
    return " ".join(out.getvalue().split())


def test_a_large_batch_shows_its_batches_peaks_and_memory() -> None:
    path = next(p for p in RECIPES if p.stem == "in1k_vit_base_etpp400")
    plan = plan_run(Recipe.load(path, ["curriculum.large_batch=tokens"]))
    assert [row.stage.batch_size for row in plan.stages] == [22272, 7936, 4096]
    assert [row.micro_batch for row in plan.stages] == [1392, 496, 256]
    memory = [row.memory_bytes for row in plan.stages]
    assert max(memory) / min(memory) < 1.15
    assert plan.speedup_by_area == pytest.approx(4.0, rel=1e-3)
    text = printed(plan)
    for words in ("22272", "1392 / 496 / 256 images", "0.013 / 0.00465 / 0.0024", "rescaled with the batch"):
        assert words in text


def test_a_budget_in_hours_has_no_steps_yet(tiny_recipe: Callable[..., Recipe]) -> None:
    plan = plan_run(tiny_recipe("budget_epochs=null", "budget_hours=2.5"))
    assert not plan.decided
    assert [round(row.area_share, 3) for row in plan.stages] == [0.2, 0.4, 0.4]
    text = printed(plan)
    assert "a budget of 2.5 hours: the run measures its speed and decides its steps" in text
    assert "speed-up" not in text
    assert "epochs" not in text


def test_a_plan_without_the_images_assumes_a_number_of_classes(
    tiny_classifier: Callable[..., FinetuneRecipe],
) -> None:
    away = ["data=folder", "data.root=/nowhere", "data.num_images=64", "data.mean=null", "data.std=null"]
    plan = plan_run(tiny_classifier(*away))
    assert plan.num_images == 64
    assert any("and 1,000 classes" in line for line in plan.found)
    with pytest.raises(NotAtHand):
        plan_run(tiny_classifier(*away, "data.num_images=null"))
