"""A recipe's text is bounded before it is read, and its numbers before they cost memory or time."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from etpp_ssl.cli import main
from etpp_ssl.config import UserError
from etpp_ssl.recipe import Recipe, load_any, parse_any
from etpp_ssl.recipe_yaml import MAX_BYTES

MINIMAL = "output: runs/x\nbudget_epochs: 2\nbatch_size: 4\ndata: {name: synthetic}\n"

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [*{chr(97 + level)}, *{chr(97 + level)}]\n" for level in range(20)
)

TEXTS: dict[str, tuple[str, str]] = {
    "empty": ("", "output is missing"),
    "a list": ("[1, 2]", "does not hold `key: value` lines"),
    "a word": ("hello", "does not hold `key: value` lines"),
    "several documents": (MINIMAL + "---\n" + MINIMAL, "not valid YAML"),
    "python object": (
        "a: !!python/object/apply:os.system ['touch {mark}']",
        "tags ('tag:yaml.org,2002:python",
    ),
    "python name": ("!!python/name:os.system", "tags ("),
    "renamed tag": (
        "%TAG ! tag:yaml.org,2002:python/\n---\n!object/apply:os.system [touch {mark}]",
        "tags (",
    ),
    "a core tag that lies": ("seed: !!int x", "tags ('tag:yaml.org,2002:int')"),
    "a set": ("a: !!set {x, y}", "tags ("),
    "billion laughs": (MINIMAL + LAUGHS, "aliases (*a) are not supported"),
    "itself": ("a: &a [*a]", "aliases (*a)"),
    "a merge": ("<<: {seed: 1}\n" + MINIMAL, "merges (<<)"),
    "a key twice": (MINIMAL + "seed: 1\nseed: 2\n", "key 'seed' stands twice"),
    "a key twice inside": (MINIMAL + "optim: {eps: 1.0, eps: 2.0}\n", "key 'eps' stands twice below line 5"),
    "a key that is a number": (MINIMAL + "1: 2\n", "key 1 below line 1 is not a word"),
    "a key that is a date": (MINIMAL + "2001-09-01: 1", "unknown key '2001-09-01'"),
    "a key that is true": ("on: 1", "key True"),
    "a key that is a list": ("? [1]\n: 2", "not valid YAML"),
    "no date": ("seed: 2001-99-01", "seed is '2001-99-01'"),
    "brackets": ("a: " + "[" * 20_000, "nested deeper than 32 levels"),
    "braces": ("{" * 20_000, "nested deeper than 32 levels"),
    "dashes": ("- " * 20_000, "nested deeper than 32 levels"),
    "indents": ("".join(" " * i + "a:\n" for i in range(400)), "nested deeper than 32 levels"),
    "too long": (MINIMAL + "#" * MAX_BYTES, "more than 131,072"),
    "digits": ("seed: " + "9" * 20_000, "whole number of 20,000 digits"),
    "hexadecimal digits": ("seed: 0x" + "f" * 5_000, "whole number of 5,002 digits"),
    "base sixty": ("seed: " + "1:" * 20_000 + "1", "seed is '1:1:1"),
    "null byte": ("a: b\0c", "not valid YAML"),
    "escaped null byte": ('output: "a\\0b"\n', "holds a null byte"),
    "escaped surrogate": ('output: "a\\ud800b"\n', "holds bytes that are not UTF-8"),
    "control bytes": ("a: \x01\x02", "not valid YAML"),
    "a long key": (MINIMAL + "k" * 900 + ": 1\n", "unknown key 'kkk"),
    "a long value": (MINIMAL + "precision: " + "v" * 9_000, "precision is 'vvv"),
    "a long list": (MINIMAL + "in_chans: [" + "1," * 2_000 + "]", "in_chans is [1, 1"),
    "a task that is a list": (MINIMAL + "task: [a]", "task is ['a']"),
    "code in a string": (MINIMAL + "seed: __import__('os').system('touch {mark}')", "seed is"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_text_is_one_sentence_and_takes_no_memory(name: str, tmp_path: Path) -> None:
    text, words = TEXTS[name]
    mark = tmp_path / "executed"
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            parse_any(text.replace("{mark}", str(mark)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1100
    assert peak < 60e6
    assert not mark.exists()


OVERRIDES: dict[str, tuple[str, str]] = {
    "nothing": ("", "is not of the form key=value"),
    "no key": ("=1", "is not of the form key=value"),
    "dots": (".=1", "unknown key"),
    "a deep key": ("a." * 50_000 + "b=1", "its key has 50,001 parts"),
    "python object": ("data=!!python/object/apply:os.system [id]", "data.name is '!!python"),
    "python object in a list": ("data.mean=[!!python/object/apply:os.system [id]]", "tags ("),
    "aliases": ("model={a: &a 1, b: *a}", "aliases (*a)"),
    "brackets": ("model=" + "[" * 20_000, "nested deeper"),
    "too long": ("output=" + "x" * 200_000, "more than 131,072"),
    "bytes": ("output=" + os.fsdecode(b"caf\xe9"), "holds bytes that are not UTF-8"),
    "a line break": ("seed=1\n2", "seed is '1 2'"),
    "two documents": ("seed=1\n---\n2", "not valid YAML"),
    "a key with a line break": ("a\nb=1", "unknown key 'a\\nb'"),
    "null byte": ("output=a\0b", "holds a null byte"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_hostile_override_is_one_sentence(name: str) -> None:
    override, words = OVERRIDES[name]
    with pytest.raises(UserError) as caught:
        Recipe.parse(MINIMAL, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1100


HUGE = [
    "seed=" + "9" * 50,
    *(f"image_size={size}" for size in ("1000000000", "0", "-16", "[16, 1000000000]", "1e400", "9" * 31)),
    *(f"in_chans={count}" for count in ("1000000000", "9" * 31, "1e300")),
    *(f"batch_size={count}" for count in ("1000000000000000000", "9" * 31, "1e300", ".inf", ".nan")),
    *(f"budget_epochs={epochs}" for epochs in ("1e300", "1e400", ".nan", "-.inf", "9" * 31)),
    "baseline_epochs=1e300",
    "data.num_workers=1000000",
    "data.prefetch=1000000000",
    "data.num_images=" + "9" * 31,
    "data.size=1000000000",
    "data.crop_scale=[.nan, 1.0]",
    "data.max_pixels=" + "9" * 31,
    *(f"model.depth={depth}" for depth in ("1000000", "9" * 31)),
    *(f"model.embed_dim={dim}" for dim in ("1000000000", "9" * 31)),
    *(f"model.patch_size={size}" for size in ("0", "-4", "[0, 4]", "9" * 31)),
    "model.num_heads=" + "9" * 31,
    "model.mlp_ratio=1e300",
    "model.reg_tokens=1000000000",
    "model.position_grid=[1000000000, 1]",
    "model.decoder.depth=1000000",
    "model.decoder.embed_dim=1000000000",
    "model.name=local-dir:{tmp}",
    "model.name=hf-hub:somebody/something",
    "model.name=" + "v" * 2000,
    "curriculum.stages=[{bandwidth: " + "9" * 31 + ", share: 1.0}]",
    "curriculum.stages=[{bandwidth: 16, share: 1.0, batch_factor: 1e300}]",
    "curriculum.stages=[{bandwidth: 16, share: 1.0, replay: {times: 10000000000, buffer: 1}}]",
    "optim.base_lr=1e300",
    "optim.min_lr=1e300",
    "optim.weight_decay=1e400",
    "optim.betas=[.nan, 0.5]",
    "checkpoint.keep=" + "9" * 31,
    "probe={name: knn, k: " + "9" * 50 + "}",
    "target={name: hog, bins: 1000000000}",
    "output=" + "x" * 300,
]


@pytest.mark.parametrize(
    ("command", "override"),
    # Most are refused where both commands read the recipe; a plan writes no output.
    [
        *(("plan", text) for text in HUGE if not text.startswith("output=")),
        *(("pretrain", text) for text in HUGE[-1::-3]),
    ],
    ids=lambda text: text[:40],
)
def test_a_huge_number_is_one_sentence_before_it_costs_anything(
    command: str,
    override: str,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "recipe.yaml"
    tiny_recipe().save(file)
    with pytest.raises(SystemExit) as stop:
        main([command, str(file), override.replace("{tmp}", str(tmp_path))])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert line.startswith("etpp: error: ")
    assert override.partition("=")[0].split(".")[0] in line
    assert len(line) < 1200
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_what_no_machine_can_hold_is_a_sentence_before_it_is_built(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    tiny_recipe().save(file)
    largest = ["curriculum=constant", "model.embed_dim=16384", "model.depth=60"]
    pixels = ["curriculum=constant", "image_size=16384", "model.patch_size=64", "batch_size=1000000"]
    for overrides, words in ((largest, "values take "), (pixels, "images of 16384 pixels take ")):
        with pytest.raises(SystemExit) as stop:
            main(["pretrain", str(file), *overrides])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert words in line
        assert "but this machine has " in line
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_numbers_in_a_classifiers_arguments_are_bounded_too() -> None:
    text = MINIMAL + "task: finetune\nmodel: {name: swin_tiny_patch4_window7_224, args: %s}\n"
    for args in ("{depths: [1000000]}", "{embed_dim: 1000000000}", "{a: {b: [.nan]}}", "{a: 1e300}"):
        with pytest.raises(UserError, match="numbers in it must be at most"):
            parse_any(text % args)


FILES: dict[str, tuple[bytes, str]] = {
    "binary": (bytes(range(256)) * 8, "cannot be read: 'utf-8' codec can't decode"),
    "UTF-16": (MINIMAL.encode("utf-16"), "cannot be read: 'utf-8' codec can't decode"),
    "Latin-1": (b"output: caf\xe9\n", "cannot be read: 'utf-8' codec can't decode"),
    "nothing": (b"", "output is missing"),
    "null bytes": (bytes(1000), "not valid YAML"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, words = FILES[name]
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_any(tmp_path / "r.yaml")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(1 << 30)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="cannot be read: its 1,073,741,824 bytes are more than 131,072"):
            load_any(tmp_path / "r.yaml")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_any(tmp_path / "r.yaml").batch_size == 4


@pytest.mark.parametrize(
    "text",
    [
        *("plain", "a'b\"c\\d", "line\nbreak", "tab\t", "ünïcode \u2028 😀", " lead", "x" * 500 + " y"),
        *(
            "set #1",
            "Photos: 2024",
            "20241130",
            "2024-11-30",
            "1:30",
            "5e-4",
            "08",
            "010",
            "0x1f",
            "1_0",
            ".5",
        ),
        *(
            "null",
            "None",
            "~a",
            "true",
            "off",
            "'a'",
            '"a"',
            "[a]",
            "{a: b}",
            "- a",
            "*a",
            "&a",
            "!a",
            "@a",
            "a: ",
        ),
        *("a=b", "# a", "%a", "|", ">", "?", "C:\\data", "a,b", "\x01"),
    ],
)
def test_a_key_that_takes_text_takes_it_as_it_stands(text: str, tmp_path: Path) -> None:
    recipe = Recipe.parse(MINIMAL, [f"output={text}", "data=folder", f"data.root={text}"])
    assert recipe.output == text
    assert recipe.data.model_dump()["root"] == text
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_a_run_folder_may_have_any_name(tmp_path: Path) -> None:
    for name in ("line\nbreak", "a'b\"c", "😀 \u2028", "{a: b}", "* x", "#"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(MINIMAL)
        assert load_any(tmp_path / name).output == str(tmp_path / name)
