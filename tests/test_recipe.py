"""Recipes: what is read, what is refused and with which sentence."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from tiny_runs import TINY, TINY_CLASSIFIER

from etpp_ssl import messages, recipe_file
from etpp_ssl.config import UserError
from etpp_ssl.curriculum.efficienttrain import ConstantConfig, EfficientTrainConfig
from etpp_ssl.data.sources.folder import FolderConfig
from etpp_ssl.model.decoders import CrossDecoderConfig, MAEDecoderConfig
from etpp_ssl.model.mask_patterns import BlockMaskingConfig
from etpp_ssl.model.masking import MaskRatioRamp
from etpp_ssl.recipe import FinetuneRecipe, Recipe, load_any
from etpp_ssl.recipe_file import changed_keys, shipped_recipes
from etpp_ssl.run_folder import RunFolder

MINIMAL = "output: runs/x\nbudget_epochs: 2\nbatch_size: 4\ndata: {name: synthetic}\n"


@pytest.mark.parametrize("text", ["5e-4", "5.0e-4", "0.0005", "5E-4", "+5e-4"])
def test_floats_are_read_as_yaml_1_2_writes_them(text: str) -> None:
    assert Recipe.parse(MINIMAL, [f"optim.base_lr={text}"]).optim.base_lr == 5e-4


@pytest.mark.parametrize("stated", ["efficienttrain", "null"])
def test_a_name_takes_the_place_of_a_name_or_of_nothing(stated: str) -> None:
    recipe = Recipe.parse(f"{MINIMAL}curriculum: {stated}\n", ["curriculum=constant"])
    assert recipe.curriculum.name == "constant"


def test_an_override_of_a_section_by_name_stands_for_its_name() -> None:
    stages = "curriculum: {name: efficienttrain, crop: lanczos, stages: [{bandwidth: 224, share: 1.0}]}\n"
    recipe = Recipe.parse(MINIMAL + stages, ["curriculum=constant"])
    assert recipe.curriculum == ConstantConfig(crop="lanczos")


def test_a_new_data_source_does_not_inherit_the_old_ones_image_count() -> None:
    text = MINIMAL.replace("{name: synthetic}", "{name: synthetic, num_images: 7, crop_pct: 0.5}")
    recipe = Recipe.parse(text, ["data=folder", "data.root=/x"])
    assert isinstance(recipe.data, FolderConfig)
    assert (recipe.data.num_images, recipe.data.crop_pct) == (None, 0.5)


def test_overrides_reach_nested_keys_and_lists() -> None:
    recipe = Recipe.parse(
        MINIMAL,
        [
            "image_size=[32, 48]",
            "model.decoder.depth=3",
            "curriculum.stages=[{bandwidth: 16, share: 0.5}, {bandwidth: [32, 48], share: 0.5}]",
        ],
    )
    assert recipe.size == (32, 48)
    assert recipe.model.decoder.depth == 3
    assert isinstance(recipe.curriculum, EfficientTrainConfig)
    assert recipe.curriculum.stages is not None
    assert recipe.curriculum.stages[1].bandwidth == (32, 48)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        # Text is taken as it stands, whatever it would be in YAML; tests/hostile has more of it.
        ("data.root=set #1", "data.root", "set #1"),
        ("output=20241130", "output", "20241130"),
        ("data.description=Batch #3: 'new'", "data.description", "Batch #3: 'new'"),
        # Where nothing may be said, each of these says nothing.
        *((f"init={text}", "init", None) for text in ("", "null", "None", "~")),
        *((f"budget_hours={text}", "budget_hours", None) for text in ("", "null", "None", "~")),
        ("data.mean=None", "data.mean", None),
        ("curriculum.replay=None", "curriculum.replay", None),
        # A word of a few is a word, though YAML takes it for something else.
        ("curriculum.large_batch=off", "curriculum.large_batch", "off"),
        ("tracker=none", "tracker.name", "none"),
        # Numbers, switches, lists and mappings are read as YAML.
        ("seed=010", "seed", 10),
        ("seed=1_000", "seed", 1000),
        ("deterministic=yes", "deterministic", True),
        ("image_size=[32, 48]", "image_size", (32, 48)),
        ("checkpoint={keep: 3}", "checkpoint.keep", 3),
        ("checkpoint=keep: 3", "checkpoint.keep", 3),
        ("model.mask_ratio=0.5", "model.mask_ratio", 0.5),
    ],
)
def test_the_type_of_a_key_decides_how_an_override_is_read(override: str, key: str, value: object) -> None:
    found: object = Recipe.parse(MINIMAL.replace("name: synthetic", "name: folder, root: x"), [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.urls=shards #1/{000..003}.tar", "shards #1/{000..003}.tar"),
        ("data.urls=['a, #1', 20241130, null]", ("a, #1", "20241130", "null")),
        ("data.urls=[ab]*.tar", "[ab]*.tar"),
        ("data.urls=[set #1/{a,b}.tar, http://x: 1/c.tar]", ("set #1/{a,b}.tar", "http://x: 1/c.tar")),
    ],
)
def test_a_key_that_takes_text_or_a_list_of_it_reads_no_numbers(override: str, value: object) -> None:
    recipe = Recipe.parse(MINIMAL, ["data=webdataset", "data.num_images=4", override])
    assert recipe.data.model_dump()["urls"] == value


def test_arguments_of_unknown_type_are_one_scalar_or_a_list_or_a_mapping() -> None:
    text = MINIMAL + "task: finetune\nmodel: {name: swin_tiny_patch4_window7_224}\n"
    given = ["a=set #1", "b=1e-2", "c=true", "d=[1, {e: x}]", "f='5'", "g=x: y", "h=null"]
    recipe = FinetuneRecipe.parse(text, [f"model.args.{item}" for item in given])
    assert recipe.model.args == {
        "a": "set #1", "b": 0.01, "c": True, "d": [1, {"e": "x"}], "f": "5", "g": "x: y", "h": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        (["batch_size=many"], "override 'batch_size=many': batch_size is 'many'"),
        (["seed=1", "model.depth=0", "model.decoder.depth=1"], "override 'model.depth=0': model.depth is 0"),
        (["data=folder", "seed=1"], "override 'data=folder': data.root is missing"),
        (["seed=1", "seed=x"], "override 'seed=x': seed is 'x'"),
        (["budget_hours=1"], "override 'budget_hours=1': the recipe: budget_epochs is 2"),
        (["data.labels_per_class=2", "seed=3", "data.label_share=0.5"],
         "overrides 'data.labels_per_class=2', 'data.label_share=0.5': data: label_share is 0.5"),
    ],
)  # fmt: skip
def test_a_bad_override_is_named_and_not_the_file(overrides: list[str], title: str, tmp_path: Path) -> None:
    write(tmp_path, mine=MINIMAL)
    with pytest.raises(UserError, match=f"^{re.escape(title)}"):
        Recipe.load(tmp_path / "mine.yaml", overrides)
    write(tmp_path, bad=MINIMAL + "precision: fp8\n")
    with pytest.raises(UserError, match=r"bad\.yaml: precision is 'fp8'"):
        Recipe.load(tmp_path / "bad.yaml", ["seed=1"])
    write(tmp_path, bad=MINIMAL + "budget_hours: 3\n")
    with pytest.raises(UserError, match=r"bad\.yaml: the recipe: budget_epochs is 2"):
        Recipe.load(tmp_path / "bad.yaml", ["seed=1"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("lr=1", "optim.base_lr"),
        ("epochs=2", "budget_epochs"),
        ("workers=2", "data.num_workers"),
        ("data.workers=2", "data.num_workers"),
        ("num_workers=2", "data.num_workers"),
        ("mask_ratio=0.5", "model.mask_ratio"),
        ("optim.epochs=2", "budget_epochs"),
        ("bs=2", "batch_size"),
    ],
)
def test_another_projects_word_for_a_key_is_answered_with_ours(override: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"unknown key .* did you mean '{meant}'"):
        Recipe.parse(MINIMAL, [override])


def test_every_synonym_leads_to_a_key() -> None:
    for word, key in messages.SYNONYMS.items():
        kinds = [kind for kind in (Recipe, FinetuneRecipe) if messages.types_at(kind, key.split("."))]
        assert kinds, key
        for kind in kinds:
            assert not messages.types_at(kind, [word]), word


@pytest.mark.parametrize(
    "override", ["model.decoder=cross", "model.decoder.name=cross", "model={decoder: {name: cross}}"]
)
def test_a_nested_section_is_taken_over_by_name_with_its_own_defaults(override: str) -> None:
    decoder = Recipe.parse(MINIMAL, [override]).model.decoder
    assert decoder == CrossDecoderConfig()


def test_a_new_decoder_keeps_what_means_the_same_to_it_and_drops_the_rest() -> None:
    text = MINIMAL + "model: {decoder: {embed_dim: 128, depth: 4}}\n"
    cross = Recipe.parse(text, ["model.decoder=cross"]).model.decoder
    assert cross == CrossDecoderConfig(embed_dim=128)
    back = Recipe.parse(
        MINIMAL, ["model.decoder=cross", "model.decoder.reads=output", "model.decoder=mae"]
    ).model.decoder
    assert back == MAEDecoderConfig()
    assert Recipe.parse(MINIMAL, ["model.decoder.depth=3"]).model.decoder == MAEDecoderConfig(depth=3)
    block = Recipe.parse(MINIMAL, ["model.masking=block", "model.masking.max_side=0.4"]).model.masking
    assert block == BlockMaskingConfig(max_side=0.4)
    assert Recipe.parse(MINIMAL, ["model.masking=block", "model.masking=grid"]).model.masking.name == "grid"


def test_text_in_a_file_that_yaml_takes_for_something_else() -> None:
    recipe = Recipe.parse(MINIMAL + "curriculum: {name: efficienttrain, large_batch: off}\n")
    assert recipe.curriculum == EfficientTrainConfig(large_batch="off")
    assert Recipe.parse(MINIMAL.replace("runs/x", "2024-11-30 10:00:00Z")).output == "2024-11-30 10:00:00Z"
    for text in ("20241130", "1e5", "true"):
        with pytest.raises(UserError, match=r"output is .*: it should be a valid string; put it in quotes"):
            Recipe.parse(MINIMAL.replace("runs/x", text))


def test_a_mask_ratio_is_a_number_or_a_ramp() -> None:
    recipe = Recipe.parse(MINIMAL, ["model.mask_ratio={start: 0.6, end: 0.8}"])
    assert recipe.model.mask_ratio == MaskRatioRamp(start=0.6, end=0.8)
    assert recipe.model.final_mask_ratio == 0.8
    changed = changed_keys(Recipe.parse(MINIMAL), recipe)
    assert [text.split(" ")[0] for text in changed] == ["model.mask_ratio"]


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe.parse(MINIMAL, ["image_size=[32, 48]", "probe=knn", "optim.base_lr=1e-05",
                                    "model.decoder=cross", "model.masking=block",
                                    "model.mask_ratio={start: 0.6, end: 0.8}"])  # fmt: skip
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    # A run that was moved goes on where it is now.
    assert Recipe.load(tmp_path) == recipe.model_copy(update={"output": str(tmp_path)})
    assert Recipe.load(tmp_path, ["output=elsewhere"]).output == "elsewhere"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["colour=red"], ["unknown key 'colour'", "valid keys are", "batch_size"]),
        (["model.pach_size=3"], ["unknown key 'model.pach_size'", "did you mean 'patch_size'"]),
        (["model.decoder.dpth=3"], ["'model.decoder.dpth'", "'depth'"]),
        (["data.rot=3"], ["unknown key 'data.rot'", "num_eval_images"]),
        (["batch_size=many"], ["batch_size is 'many'", "integer"]),
        (["batch_size='4'"], ["batch_size is '4'", "integer"]),
        (["batch_size=true"], ["batch_size is True", "integer"]),
        (["batch_size=2.5"], ["batch_size is 2.5", "integer"]),
        (["batch_size=0"], ["batch_size is 0", "greater than or equal to 1"]),
        (["budget_epochs=.inf"], ["budget_epochs is inf", "finite"]),
        (["budget_epochs=-1"], ["budget_epochs is -1", "greater than 0"]),
        (["budget_hours=12"], ["budget_epochs is 2", "budget_hours is 12", "exactly one"]),
        (["budget_epochs=null"], ["budget_epochs is None and budget_hours is None", "exactly one"]),
        (["budget_epochs=null", "budget_hours=0"], ["budget_hours is 0", "greater than 0"]),
        (["budget_epochs=null", "budget_hours=-2"], ["budget_hours is -2", "greater than 0"]),
        (["curriculum.large_batch=yes"], ["curriculum.large_batch is 'yes'", "'tokens'"]),
        (["curriculum.stages=[{bandwidth: 32, share: 1, batch_factor: 0}]"], ["batch_factor is 0"]),
        (["curriculum=cosine"], ["curriculum.name is 'cosine'", "efficienttrain, constant"]),
        (["data={root: x}"], ["data.name is missing", "folder, list, timm, synthetic"]),
        (["precision=fp8"], ["precision is 'fp8'", "'bf16'"]),
        (["model.mask_ratio=1.0"], ["model.mask_ratio is 1.0", "less than 1"]),
        (["model.mask_ratio={start: 0.5}"], ["model.mask_ratio.end is missing"]),
        (["model.mask_ratio={start: 0.5, end: 1.5}"], ["model.mask_ratio.end is 1.5", "less than 1"]),
        (["model.mask_ratio={start: 0.5, end: 0.7, shape: 1}"], ["'model.mask_ratio.shape'", "end, start"]),
        (["model.mask_ratio=high"], ["model.mask_ratio is 'high'", "number"]),
        (["model.masking=stripes"], ["model.masking.name is 'stripes'", "uniform, block, aligned, grid"]),
        (["model.masking=block", "model.masking.min_side=0.9"], ["model.masking", "larger than max_side"]),
        (["model.decoder=unet"], ["model.decoder.name is 'unet'", "mae, cross"]),
        (["model.decoder=cross", "model.decoder.predict_ratio=0"], ["predict_ratio is 0", "greater than 0"]),
        (["model.decoder=cross", "model.decoder.dpth=0"], ["'model.decoder.dpth'", "did you mean 'depth'"]),
        (["model.decoder.reads=output"], ["unknown key 'model.decoder.reads'"]),
        (["curriculum=[1]"], ["curriculum.name is [1]"]),
        (["image_size=[3]"], ["image_size"]),
        (["curriculum.stages=[{bandwidth: 32, share: 0.4}]"], ["shares of stages add up to 0.4"]),
        (
            ["curriculum.stages=[{bandwidth: 224, share: 1.0, replay: {times: 2, buffer: 0}}]"],
            ["curriculum.stages.0.replay.buffer is 0", "greater than or equal to 1"],
        ),
        (["curriculum.replay=[{times: 0, buffer: 1}, null, null]"], ["curriculum.replay.0.times is 0"]),
        (["curriculum.replay=[{times: 2.5, buffer: 1}, null, null]"], ["times is 2.5", "integer"]),
        (["curriculum.replay=[{times: 2}, null, null]"], ["curriculum.replay.0.buffer is missing"]),
        (
            ["curriculum.replay=[{times: 2, buffer: 1, time: 2}]"],
            ["'curriculum.replay.0.time'", "did you mean 'times'"],
        ),
        (["curriculum.replay=[null]"], ["replay has 1 entries", "give one for each"]),
        (["curriculum.stages=[{bandwidth: 32}]"], ["curriculum.stages.0.share is missing"]),
        (["curriculum.stages=[{bandwidth: 32, share: 2}]"], ["share is 2"]),
        (["data.crop_scale=[0.9, 0.1]"], ["crop_scale is [0.9, 0.1]"]),
        (["probe=knn", "probe.k=0"], ["probe.k: 0 is not a positive number"]),
        (["probe=knn", "probe.k=[5, -1]"], ["probe.k: [5, -1] is not a list of positive numbers"]),
        (["probe=knn", "probe.k=few"], ["probe.k is 'few'", "integer"]),
        (["probe=knn", "probe.temperature=[]"], ["probe.temperature: [] is not a list of positive numbers"]),
        (
            ["probe=knn", "probe.select_on=eval"],
            ["probe.select_on: settings are not chosen on 'eval'", "use holdout", "training images"],
        ),
        (["data.holdout=null"], ["data.holdout is null: it should be a valid integer; its default is 0"]),
        (["probe=linear_cached", "probe.select_on=test"], ["not chosen on 'test'", "use holdout"]),
        (["probe=linear_cached", "probe.holdout_share=1"], ["probe.holdout_share is 1", "less than 1"]),
        (["probe=linear_cached", "probe.base_lrs=[0.1, 0]"], ["probe.base_lrs: [0.1, 0.0] is not a list"]),
        (["probe=linear_cached", "probe.weight_decays=[]"], ["probe.weight_decays: [] is not a list"]),
        (["probe=svm"], ["probe.name is 'svm'", "knn, reconstruction"]),
        (["batch_size"], ["'batch_size' is not of the form key=value"]),
        (["a: b=c"], ["unknown key"]),
        (["model.decoder.depth=1", "model.decoder.depth.deep=1"], ["model.decoder.depth has no keys"]),
        (["model=[1"], ["not valid YAML"]),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.parse(MINIMAL, overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_recipe_takes_over_what_it_extends_and_overrides_come_last(tmp_path: Path) -> None:
    write(
        tmp_path,
        first=MINIMAL + "seed: 1\nmodel: {depth: 3, decoder: {embed_dim: 128, depth: 4}}\n",
        second="extends: first.yaml\nseed: 2\nmodel: {decoder: {name: cross, num_heads: 4}}\n",
        third="extends: second.yaml\nbatch_size: 6\ncurriculum: {name: constant}\n",
    )
    recipe = Recipe.load(tmp_path / "third.yaml", ["seed=3"])
    assert (recipe.seed, recipe.batch_size, recipe.model.depth) == (3, 6, 3)
    # A name that changes drops what means another thing to the new component, as an override does.
    assert recipe.model.decoder == CrossDecoderConfig(embed_dim=128, num_heads=4)
    recipe.save(tmp_path / "recipe.yaml")
    assert "extends" not in (tmp_path / "recipe.yaml").read_text()
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe


def test_a_recipe_may_extend_one_that_comes_with_the_package(tmp_path: Path) -> None:
    write(tmp_path, mine="extends: quickstart\nseed: 5\n")
    assert Recipe.load(tmp_path / "mine.yaml") == Recipe.load("quickstart", ["seed=5"])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": "extends: a.yaml"}, ["a.yaml: extends 'a.yaml' leads in a circle"]),
        ({"a": "extends: b.yaml", "b": "extends: a.yaml"}, ["b.yaml: extends 'a.yaml' leads in a circle"]),
        ({"a": "extends: no.yaml"}, ["a.yaml: extends 'no.yaml' does not exist"]),
        ({"a": "extends: quickstrat"}, ["a.yaml: extends 'quickstrat' does not exist", "quickstart"]),
        ({"a": "extends: [quickstart]"}, ["extends is ['quickstart']; it must be the path or the name"]),
        ({"a": "extends: null"}, ["extends is null; it must be"]),
        ({"a": "extends: b.yaml", "b": "- 1"}, ["b.yaml does not hold `key: value` lines"]),
        ({"a": "extends: b.yaml", "b": "seed: x"}, ["a.yaml: seed is 'x'", "integer"]),
        ({"a": "extends: ."}, ["cannot be read", "directory"]),
    ],
)
def test_a_mistake_in_what_is_extended_is_one_sentence(
    files: dict[str, str], words: list[str], tmp_path: Path
) -> None:
    write(tmp_path, **{name: text + ("\n" + MINIMAL) * (name == "a") for name, text in files.items()})
    with pytest.raises(UserError) as caught:
        Recipe.load(tmp_path / "a.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_exists_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Recipe.load("quickstart").batch_size == 64
    (tmp_path / "quickstart").write_text(MINIMAL)
    assert Recipe.load("quickstart").batch_size == 4


def test_a_name_that_is_not_known_is_answered_with_close_ones() -> None:
    with pytest.raises(UserError, match=r"'cifar10_vit_mirco' does not exist; .* are cifar10_vit_micro"):
        Recipe.load("cifar10_vit_mirco")
    with pytest.raises(UserError, match="does not exist; `etpp recipes` lists the names"):
        Recipe.load("!")


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_that_comes_with_the_package_resolves(name: str, tmp_path: Path) -> None:
    recipe = load_any(name)
    assert recipe.output == f"runs/{name}"
    recipe.save(tmp_path / "recipe.yaml")
    assert load_any(tmp_path / "recipe.yaml") == recipe


FAMILIES = {
    "in1k_*_etpp200": ({"output", "curriculum", "model", "optim"}, 19),
    "finetune_vit_*": ({"output", "budget_epochs", "baseline_epochs", "model", "optim"}, 3),
    "linear_vit_*": ({"output", "micro_batch_size", "model", "probe"}, 3),
    "in1k_vit_base_etpp400*": ({"output", "data", "model", "target"}, 5),
    "in1k_vit_base_mae*": ({"output", "budget_epochs", "optim", "target"}, 3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_recipes_of_a_family_differ_in_what_they_are_for(family: str) -> None:
    own, count = FAMILIES[family]
    values = [load_any(name).model_dump() for name in shipped_recipes() if fnmatch(name, family)]
    assert len(values) == count
    assert {key for key in values[0] if any(other[key] != values[0][key] for other in values)} <= own


def test_the_readers_of_version_0_5_are_where_they_were() -> None:
    with pytest.warns(DeprecationWarning, match=r"load_recipe has become etpp_ssl\.recipe\.Recipe\.load"):
        assert recipe_file.load_recipe("quickstart") == Recipe.load("quickstart")
    with pytest.warns(DeprecationWarning, match="parse_any_recipe has become"):
        assert recipe_file.parse_any_recipe(MINIMAL) == Recipe.parse(MINIMAL)
    assert not hasattr(recipe_file, "nothing")


def test_a_run_folder_may_be_named_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ada")
    assert Recipe.parse(MINIMAL, ["output=~/runs/a"]).output == "/people/ada/runs/a"
    assert Recipe.parse(MINIMAL, ["output=runs/~/a"]).output == "runs/~/a"


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="batch_size is missing"):
        Recipe.parse(MINIMAL.replace("batch_size: 4\n", ""))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1\n- 2\n",
        "hello",
        "a: [",
        "!!python/object/apply:os.system ['true']",
        "a: &a [*a]",
        "a: &a [1, 1]\nb: &b [*a, *a]",
        "\x00",
        "a: " + "[" * 5000,
    ],
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        Recipe.parse(text)


def test_a_missing_file_and_a_folder_without_recipe_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Recipe.load(tmp_path / "no.yaml")
    with pytest.raises(UserError, match=r"folder without recipe\.yaml"):
        Recipe.load(tmp_path)


def test_only_keys_that_change_the_result_count_as_changes() -> None:
    base = Recipe.parse(MINIMAL)
    free = [
        "output=y",
        "data.num_workers=0",
        "data.max_bad_share=0.5",
        "checkpoint.every_steps=3",
        "tracker=tensorboard",
        "probe=knn",
        "micro_batch_size=2",
        "log_every_steps=1",
        "baseline_epochs=9",
    ]
    assert changed_keys(base, Recipe.parse(MINIMAL, free)) == []
    changed = changed_keys(
        base, Recipe.parse(MINIMAL, ["optim.base_lr=1e-3", "seed=1", "curriculum=constant"])
    )
    assert [text.split(" ")[0] for text in changed] == ["seed", "curriculum.name", "optim.base_lr"]


def test_a_run_finds_its_data_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "photos", home / "shards #1", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.chdir(home)
    relative = Recipe.parse(MINIMAL, ["data=folder", "data.root=photos"])
    relative.save(home / "run" / "recipe.yaml")
    stream = ["data=webdataset", "data.num_images=4", "data.eval={name: folder, root: photos}"]
    stream += ["data.urls=[shards #1/{0..3}.tar, http://x/a.tar, b/*.tar]"]
    Recipe.parse(MINIMAL, stream).save(home / "streamed" / "recipe.yaml")
    # As it was given, as long as that is enough.
    assert Recipe.load("run").data == relative.data
    assert "root: photos" in (home / "run" / "recipe.yaml").read_text()
    monkeypatch.chdir(elsewhere)
    assert Recipe.load(home / "run").data.model_dump()["root"] == str(home / "photos")
    assert RunFolder(home / "run").recipe().data.model_dump()["root"] == str(home / "photos")
    assert Recipe.load(home / "run", ["data.root=photos"]).data.model_dump()["root"] == "photos"
    assert changed_keys(relative, Recipe.load(home / "run")) == []
    found = Recipe.load(home / "streamed").data.model_dump()
    assert found["urls"] == (str(home / "shards #1/{0..3}.tar"), "http://x/a.tar", "b/*.tar")
    assert found["eval"]["root"] == str(home / "photos")
    # A run that was moved, data and all, to where its first folder is not.
    (home / "photos").rename(elsewhere / "photos")
    assert Recipe.load(home / "run").data.model_dump()["root"] == "photos"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A classifier's recipe file, and a pre-training run of another network, size and channels."""
    file, folder = tmp_path / "classifier.yaml", tmp_path / "pretrained"
    constant = TINY_CLASSIFIER[: TINY_CLASSIFIER.index("curriculum:")] + "curriculum: {name: constant}\n"
    file.write_text(constant + TINY_CLASSIFIER[TINY_CLASSIFIER.index("checkpoint:") :], encoding="utf-8")
    folder.mkdir()
    other = ["model.embed_dim=24", "image_size=[24,40]", "in_chans=1", "data.mean=[0.3]", "data.std=[0.2]"]
    recipe = Recipe.parse(TINY, [*other, "curriculum=constant"])
    recipe.save(folder / "recipe.yaml")
    return file, folder


def test_a_classifier_takes_the_network_of_the_run_that_it_starts_from(files: tuple[Path, Path]) -> None:
    file, folder = files
    recipe = FinetuneRecipe.load(file, [f"init={folder}", "model.drop_path=0.2", "data.std=[0.5]"])
    assert (recipe.model.embed_dim, recipe.model.depth) == (24, 1)
    assert (recipe.size, recipe.in_chans) == ((24, 40), 1)
    assert (recipe.data.mean, recipe.data.std) == ((0.3,), (0.5,))
    # What is no network's stays the recipe's, or the override's.
    assert recipe.model.drop_path == 0.2
    assert recipe.optim.ema == 0.9
    assert recipe.notes == (
        f"model, image_size, in_chans, data.mean and data.std are those of init {folder}; the recipe has "
        f"another network",
    )


def test_the_same_network_may_be_tuned_at_another_size(files: tuple[Path, Path]) -> None:
    file, folder = files
    same = ["model.embed_dim=24", "model.depth=1", f"init={folder}"]
    for overrides in (
        same,
        [*same, "model.patch_size=8"],
        ["model.name=vit", f"init={folder}"],
        [f"init={folder / 'recipe.yaml'}"],
    ):
        recipe = FinetuneRecipe.load(file, overrides)
        assert recipe.size == FinetuneRecipe.load(file).size
        assert not recipe.notes


def test_a_stored_recipe_is_read_as_it_stands(files: tuple[Path, Path], tmp_path: Path) -> None:
    file, folder = files
    (tmp_path / "run").mkdir()
    FinetuneRecipe.load(file, [f"init={folder}"]).save(tmp_path / "run" / "recipe.yaml")
    (folder / "recipe.yaml").write_text("model: {name: vit, embed_dim: 8}", encoding="utf-8")
    assert FinetuneRecipe.load(tmp_path / "run").model.embed_dim == 24
