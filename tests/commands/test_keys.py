"""`etpp keys`: every key of every recipe, with its meaning."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel
from rich.console import Console

from etpp_ssl.cli import main
from etpp_ssl.commands.keys import docstrings, markdown_reference, print_keys, sections
from etpp_ssl.config import Config, UserError
from etpp_ssl.recipe import load_any

HOMES = tuple(
    f"etpp_ssl.{home}" for home in ("curriculum", "data", "evaluation", "model", "optim", "recipe", "targets")
)


def configs(kind: type[BaseModel] = Config) -> list[type[BaseModel]]:
    """Every Config that a recipe can hold; other modules have records of the same kind."""
    below = [inner for sub in kind.__subclasses__() for inner in configs(sub)]
    return [*below, *(sub for sub in kind.__subclasses__() if sub.__module__.startswith(HOMES))]


@pytest.mark.parametrize("config", dict.fromkeys(configs()), ids=lambda config: config.__qualname__)
def test_every_key_of_every_config_has_a_docstring(config: type[BaseModel]) -> None:
    told = docstrings(config)
    # The name that chooses a component is told by the Config's own docstring.
    assert [key for key in config.model_fields if key not in told and key != "name"] == []
    assert config.__doc__


def test_every_key_of_a_resolved_recipe_is_in_the_reference() -> None:
    known = {key.path for part in sections() for key in part.keys}

    def paths(values: dict[str, object], prefix: str = "") -> list[str]:
        found = []
        for key, value in values.items():
            if isinstance(value, dict) and f"{prefix}{key}" != "model.args":
                found += paths(value, f"{prefix}{key}.")
            elif key != "name" or f"{prefix}name" in known:
                found.append(f"{prefix}{key}")
        return found

    for name in (
        "quickstart",
        "cifar10_linear",
        "in1k_cswin_base_etpp200",
        "in1k_vit_base_etpp400_hog_cross",
    ):
        assert set(paths(load_any(name).model_dump(mode="json"))) <= known


def test_the_reference_tells_type_default_meaning_and_what_may_change() -> None:
    keys = {key.path: key for part in sections() for key in part.keys}
    assert keys["batch_size"][1:3] == ("integer, ≥ 1, ≤ 1,000,000", "required")
    assert keys["precision"][1:3] == ("fp32 or bf16 or fp16", "bf16")
    assert keys["image_size"].type == "integer or [integer, integer]"
    assert keys["target.parts"][1:3] == ("list of section", "[pixels, hog]")
    assert keys["model.mask_ratio"].type == "number, > 0, < 1 or section"
    assert "None" not in "".join(key.meaning for key in keys.values())
    changeable = {path for path, key in keys.items() if key.may_change}
    assert {"output", "data.num_workers", "checkpoint.keep", "probe.k", "data.eval"} <= changeable
    assert not {"seed", "optim.base_lr", "model.depth", "data.crop_scale"} & changeable
    # A section that both tasks have alike stands once; keys that all components have, too.
    titles = [(part.title, part.tasks) for part in sections()]
    assert len(titles) == len(set(titles))
    assert ("checkpoint", ("pretrain", "finetune")) in titles
    assert [part.title for part in sections("data") for key in part.keys if key.path == "data.flip"] == [
        "data"
    ]


def test_the_markdown_tables_have_as_many_cells_in_every_row() -> None:
    rows = [line for line in markdown_reference("model").splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_a_section_is_printed_and_an_unknown_one_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    main_exits(["keys", "curriculum.stages"], 0)
    printed = capsys.readouterr().out
    assert "curriculum.stages.bandwidth" in printed
    assert "optim" not in printed
    main_exits(["keys", "curiculum"], 2)
    assert "section 'curiculum' is not known; did you mean curriculum" in capsys.readouterr().err


def test_a_key_is_in_one_piece_on_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as captured:
        print_keys(None, console)
    lines = captured.get().splitlines()
    printed = {line.split()[0] for line in lines if re.match(r"  \S", line)}
    assert printed >= {key.path for part in sections() for key in part.keys}
    assert max(map(len, lines)) <= 80


def main_exits(arguments: list[str], code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert (stop.value.code or 0) == code


@pytest.mark.parametrize(
    ("asked", "titles"),
    [
        ("target=hog", ["target", "target=hog"]),
        ("model.decoder=cross", ["model.decoder", "model.decoder=cross"]),
        ("data.root", ["data=folder", "data=list", "data=timm", "data=shards"]),
        ("optim.base_lr", ["optim", "optim"]),
    ],
)
def test_one_component_or_one_key_can_be_asked_for(asked: str, titles: list[str]) -> None:
    assert [part.title for part in sections(asked)] == titles


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("target=gradients", "target is one of pixels, hog, combined, not 'gradients'"),
        ("lr", "did you mean optim.base_lr"),
        ("curriclum", "did you mean curriculum"),
    ],
)
def test_an_unknown_section_is_one_sentence(asked: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        sections(asked)
