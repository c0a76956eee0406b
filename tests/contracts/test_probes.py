"""What every probe of the recipes promises; a new one is found by itself.

It yields finite numbers, the same every time and for every number of processes, and leaves the model as
it was; one that needs labels beats chance on images that differ by class.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from ranks import Server
from tiny_runs import TINY

from etpp_ssl.data.views import Normalise
from etpp_ssl.dist.peers import leave
from etpp_ssl.evaluation.base import Probe
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.recipe import AnyProbe, Recipe
from etpp_ssl.tasks.mae import build_probe

NAMES = sorted({config.model_fields["name"].default for config in get_args(AnyProbe)} - {"none"})
LABELLED = [name for name in NAMES if name != "reconstruction"]

QUICK = {
    "linear": ["probe.epochs=30", "probe.warmup_epochs=3", "probe.base_lr=100"],
    "attentive": ["probe.batch_size=24", "probe.base_lr=3e-2"],
}
"""Overrides that make a probe of some name quick on tiny data."""
FEW_EPOCHS = {"linear": ["probe.epochs=4", "probe.warmup_epochs=1"], "attentive": ["probe.epochs=4"]}
"""Where nothing has to be learnt."""
MILD = {"linear": ["probe.base_lr=1"]}
"""The rate at which few images are learnt quickly magnifies rounding, too."""
SWEPT = {"knn": ["probe.k=[1, 5, 20]", "probe.temperature=[0.02, 0.07]"]}
"""Overrides that make a probe choose among settings where its defaults do not."""

CASES = [(name, QUICK.get(name, [])) for name in NAMES] + list(SWEPT.items())
every_probe = pytest.mark.parametrize(
    ("name", "overrides"), [pytest.param(*case, id="-".join([case[0], *case[1]])) for case in CASES]
)
every_labelled_probe = pytest.mark.parametrize(
    ("name", "overrides"),
    [pytest.param(*case, id="-".join([case[0], *case[1]])) for case in CASES if case[0] in LABELLED],
)
DATA = ["data.num_classes=4", "data.num_images=240", "data.num_eval_images=80"]


def build(recipe: Recipe) -> tuple[Probe, MaskedAutoencoder]:
    accelerator = Accelerator(cpu=True)
    normalise = Normalise(*recipe.data.statistics(recipe.in_chans), accelerator.device)
    probe = build_probe(recipe, accelerator, normalise, recipe.build_objective())
    assert probe is not None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return probe, recipe.build_model()


@every_probe
@pytest.mark.parametrize("training", [True, False])
def test_it_is_deterministic_and_leaves_everything_as_it_was(
    name: str, overrides: list[str], training: bool, tiny_recipe: Callable[..., Recipe]
) -> None:
    probe, model = build(tiny_recipe(f"probe={name}", *overrides, *FEW_EPOCHS.get(name, [])))
    model.train(training)
    model.encoder.blocks[0].train(not training)
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    first = probe.run(model)
    assert first
    assert all(torch.tensor(float(value)).isfinite() for value in first.values())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.encoder.blocks.parameters())

    torch.manual_seed(99)
    model.eval()
    assert probe.run(model) == first


@every_labelled_probe
def test_it_beats_chance_on_images_that_differ_by_class(
    name: str, overrides: list[str], tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    write_coloured(tmp_path)
    probe, model = build(tiny_recipe(f"probe={name}", *overrides, "data=folder", f"data.root={tmp_path}"))
    numbers = probe.run(model)
    # Three classes.
    assert numbers[f"{name}_top1"] > 60
    # The classes have as many images each.
    assert numbers[f"{name}_macro_top1"] == pytest.approx(numbers[f"{name}_top1"])


@every_labelled_probe
def test_labels_that_say_nothing_are_not_learnt(
    name: str, overrides: list[str], tiny_recipe: Callable[..., Recipe]
) -> None:
    probe, model = build(tiny_recipe(f"probe={name}", *overrides, *FEW_EPOCHS.get(name, []), *DATA))
    # An encoder that gives every image the same features knows nothing.
    for parameter in model.encoder.parameters():
        parameter.data.zero_()
    assert probe.run(model)[f"{name}_top1"] == pytest.approx(25, abs=1)


@pytest.fixture(scope="module")
def of_two_processes(ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """For each of two gloo processes the numbers of all cases."""
    folder = tmp_path_factory.mktemp("gloo")
    ranks.run(
        None, 2, before=f"from contracts.test_probes import write_all\nwrite_all({str(folder)!r}, rank)"
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@every_probe
def test_two_gloo_processes_give_the_numbers_of_one(
    name: str, overrides: list[str], of_two_processes: list[list[dict[str, float]]]
) -> None:
    here = numbers_on_odd_data(name, overrides)
    for everything in of_two_processes:
        assert everything[CASES.index((name, overrides))] == pytest.approx(here, rel=1e-4)


def numbers_on_odd_data(name: str, overrides: list[str]) -> dict[str, float]:
    data = [*DATA, "data.num_images=241", "data.num_eval_images=81"]
    overrides = [*overrides, *FEW_EPOCHS.get(name, []), *MILD.get(name, [])]
    probe, model = build(Recipe.parse(TINY, [f"probe={name}", *overrides, *data]))
    return probe.run(model)


def write_coloured(root: Path) -> None:
    from PIL import Image

    colours = {"blue": (20, 30, 200), "green": (20, 200, 30), "red": (200, 30, 20)}
    for split, count in (("train", 12), ("val", 6)):
        for label, colour in colours.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                noisy = tuple(min(255, c + 5 * i) for c in colour)
                Image.new("RGB", (27, 19), noisy).save(folder / f"{i}.png")


def write_all(folder: str, rank: int) -> None:
    """What one of several processes does."""
    found = [numbers_on_odd_data(*case) for case in CASES]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave(Accelerator(cpu=True))
