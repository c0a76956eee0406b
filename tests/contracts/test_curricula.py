"""What every curriculum promises; a new file in etpp_ssl/curriculum is found by itself."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
from pydantic import BaseModel

import etpp_ssl.curriculum


def component_configs(package: Any) -> list[type[BaseModel]]:
    """The Config classes of a package's modules that carry a literal `name`."""
    found = []
    for module_info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            is_config = isinstance(member, type) and issubclass(member, BaseModel)
            if is_config and member.__module__ == module.__name__:
                field = member.model_fields.get("name")
                if field is not None and get_origin(field.annotation) is Literal:
                    found.append(member)
    return found


def variants(config: type[BaseModel]) -> list[BaseModel]:
    """The default settings, and each value of each field that is a choice of words."""
    settings = [config()]
    for key, field in config.model_fields.items():
        if get_origin(field.annotation) is Literal and key != "name":
            settings += [config(**{key: value}) for value in get_args(field.annotation)]
    return settings


class Case(NamedTuple):
    """One curriculum to build, any number of times."""

    config: Any
    size: tuple[int, int]
    multiple: tuple[int, int]
    run: dict[str, Any]

    def build(self) -> Any:
        return self.config.build(image_size=self.size, multiple=self.multiple, **self.run)


CONFIGS = component_configs(etpp_ssl.curriculum)
RUNS = [
    {"num_images": 1003, "batch_size": 7, "budget_epochs": 3.3},
    {"num_images": 311, "batch_size": 64, "budget_epochs": 25.0},
]
SIZES = [((224, 224), (16, 16)), ((96, 160), (8, 16)), ((154, 98), (14, 14))]

every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(config, size, multiple, run), id=f"{config!r}-{size}-{run['batch_size']}")
        for found in CONFIGS
        for config in variants(found)
        for size, multiple in SIZES
        for run in RUNS
    ],
)


def test_the_search_finds_the_known_curricula_and_no_name_twice() -> None:
    names = [config.model_fields["name"].default for config in CONFIGS]
    assert {"constant", "efficienttrain"} <= set(names)
    assert len(names) == len(set(names))


@every_case
def test_it_covers_every_step_and_every_sample(case: Case) -> None:
    curriculum = case.build()
    next_sample = 0
    for step in range(curriculum.num_steps):
        stage = curriculum.stage_at(step)
        assert stage.step == step
        assert stage.samples.start == next_sample
        assert len(stage.samples) == stage.batch_size
        for bandwidth, full, multiple in zip(stage.bandwidth, case.size, case.multiple, strict=True):
            assert 0 < bandwidth <= full
            assert bandwidth % multiple == 0
        next_sample = stage.samples.stop
    assert next_sample == curriculum.num_samples
    for outside in (-1, curriculum.num_steps):
        with pytest.raises(IndexError):
            curriculum.stage_at(outside)


@every_case
def test_it_ends_at_the_full_image(case: Case) -> None:
    curriculum = case.build()
    assert curriculum.stage_at(curriculum.num_steps - 1).bandwidth == case.size


@every_case
def test_it_spends_its_budget(case: Case) -> None:
    curriculum = case.build()
    num_images, batch_size = case.run["num_images"], case.run["batch_size"]
    spent, last_progress = 0.0, -1.0
    for step in range(curriculum.num_steps):
        stage = curriculum.stage_at(step)
        assert last_progress < stage.progress < 1
        epochs = curriculum.equivalent_epochs_after(step)
        assert epochs == pytest.approx(spent / num_images, abs=1e-9)
        last_progress = stage.progress
        area = stage.bandwidth[0] * stage.bandwidth[1] / (case.size[0] * case.size[1])
        spent += stage.batch_size * area
    assert curriculum.equivalent_epochs == pytest.approx(spent / num_images)
    assert abs(spent - case.run["budget_epochs"] * num_images) <= batch_size / 2 + 1e-6


@every_case
def test_it_is_a_pure_function_of_the_step(case: Case) -> None:
    curriculum, other = case.build(), case.build()
    state = copy.deepcopy(vars(curriculum))
    backward = [curriculum.stage_at(step) for step in reversed(range(curriculum.num_steps))]
    forward = [other.stage_at(step) for step in range(other.num_steps)]
    assert backward[::-1] == forward
    assert vars(curriculum) == state == vars(other)
