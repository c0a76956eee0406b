"""FSDP2 on two CPU processes: DDP's losses, checkpoints like any other, evaluation, exports; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_recipes import FOLDER, fsdp_environment
from ranks import Server
from safetensors.torch import load_file
from sharded_runs import cut
from tiny_runs import TINY, TINY_CLASSIFIER

from etpp_ssl.config import UserError
from etpp_ssl.dist.sharding import check_sharded, fsdp_plugin, unit_names
from etpp_ssl.export.timm import export
from etpp_ssl.recipe import FinetuneRecipe, Recipe
from etpp_ssl.run_folder import Checkpoint, RunFolder
from etpp_ssl.train.launch import finetune, pretrain
from etpp_ssl.train.opening import open_run
from etpp_ssl.train.records import save

CUT = 4
"""Step of the checkpoint from which other runs go on, within the second of three stages."""
ROOT_MODULES = {"patch_embed", "norm", "fc_norm", "embed", "mixture", "head"}
COMMON = ["budget_epochs=0.7", "log_every_steps=1", "micro_batch_size=3", f"checkpoint.every_steps={CUT}",
          "checkpoint.keep=9", "data.num_eval_images=13"]  # fmt: skip
RUNS = {
    "mae": ["model.depth=2", "optim.clip_grad=0.02", "probe=knn", "probe.batch_size=4"],
    "cross": ["model.decoder={name: cross, embed_dim: 8, depth: 2, num_heads: 2}", "model.depth=2",
              "model.pos_embed=learned", "model.grad_checkpointing=true"],
    "rotary": ["model.name=vit_small_patch16_dinov3", "model.depth=2"],
    "half": ["precision=bf16", "budget_epochs=0.4"],
    "classifier": ["model.grad_checkpointing=true"],
    "adapters": ["model.train=lora", "model.lora_rank=2", "optim.layer_decay=0.8"],
}  # fmt: skip
Folder = Callable[[str], RunFolder]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ranks: Server) -> Folder:
    """Folders of runs, all trained by one launch of two processes; those called `one` by this process."""
    root = tmp_path_factory.mktemp("fsdp")
    recipes: dict[str, Recipe | FinetuneRecipe] = {}
    for name, overrides in RUNS.items():
        settings = [f"output={root / name}", *COMMON, *overrides]
        if name in ("classifier", "adapters"):
            recipes[name] = FinetuneRecipe.parse(TINY_CLASSIFIER, settings)
        else:
            recipes[name] = Recipe.parse(TINY, settings)
        recipes[name].save(root / f"{name}.yaml")

    one = recipes["mae"].model_copy(update={"output": str(root / "one")})
    assert isinstance(one, Recipe)
    pretrain(one)
    launch(
        ranks,
        root,
        [(name, f"{name} {how}", None) for name in RUNS for how in ("ddp", "sharded")]
        + [
            ("mae", "mae sharded from one", "one"),
            ("mae", "mae ddp from sharded", "mae sharded"),
            ("mae", "mae sharded from ddp", "mae ddp"),
            ("classifier", "classifier sharded from sharded", "classifier sharded"),
        ],
    )
    cut(root / "mae sharded", root / "one from sharded")
    pretrain(one.model_copy(update={"output": str(root / "one from sharded")}))
    return lambda name: RunFolder(root / name)


def launch(ranks: Server, root: Path, runs: list[tuple[str, str, str | None]]) -> None:
    """Train runs by two processes, each given as recipe, output and the run that it goes on from."""
    tasks = [
        {
            "recipe": f"{root / recipe}.yaml",
            "output": str(root / output),
            "sharded": output.split()[1] == "sharded",
            "reshard": recipe != "cross",
            "begins_as": None if source is None else str(root / source),
        }
        for recipe, output, source in runs
    ]
    file = root / "tasks.json"
    file.write_text(json.dumps(tasks))
    options = ["--config_file", str(FOLDER / "fsdp2_8gpu.yaml"), "--num_processes=2", "--main_process_port=0"]
    words = ["accelerate-launch", *options, str(Path(__file__).with_name("sharded_runs.py")), str(file)]
    command = f"import sys; sys.argv = {words!r}; from accelerate.commands.launch import main; main()"
    (job,) = ranks.start(None, 1, before=command, env={"CUDA_VISIBLE_DEVICES": ""})
    assert job.wait(300) == 0, job.text


def losses(run: RunFolder) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.metrics() if "loss" in row}


def tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    files = checkpoint.path.glob("*.safetensors")
    return {f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", ["mae", "cross", "rotary", "classifier", "adapters"])
def test_the_losses_are_those_of_ddp(name: str, folder: Folder) -> None:
    sharded, ddp = losses(folder(f"{name} sharded")), losses(folder(f"{name} ddp"))
    assert len(ddp) > 2 * CUT
    assert len({tuple(row["bandwidth"]) for row in folder(f"{name} ddp").metrics() if "loss" in row}) == 3
    assert sharded == pytest.approx(ddp, rel=1e-4)


def test_bf16_comes_close_to_ddps_autocast(folder: Folder) -> None:
    sharded = losses(folder("half sharded"))
    assert sharded == pytest.approx(losses(folder("half ddp")), rel=5e-3)
    # Rounded weights are computed with, not kept.
    assert {value.dtype for value in tensors(folder("half sharded").checkpoints()[0]).values()} == {
        torch.float32
    }


@pytest.mark.parametrize("name", ["mae", "cross", "rotary", "classifier", "adapters"])
def test_a_checkpoint_does_not_tell_that_it_was_written_in_parts(name: str, folder: Folder) -> None:
    pairs = zip(folder(f"{name} sharded").checkpoints(), folder(f"{name} ddp").checkpoints(), strict=True)
    for sharded, ddp in pairs:
        assert sharded.fault() is None
        assert {f.name for f in sharded.path.iterdir()} == {f.name for f in ddp.path.iterdir()}
        ours, theirs = tensors(sharded), tensors(ddp)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
            k: (v.shape, v.dtype) for k, v in theirs.items()
        }
        assert sharded.state().keys() == ddp.state().keys()
        for key, value in ours.items():
            if key.endswith("kv.bias"):
                continue  # Keys' biases have no gradient beyond rounding, of which Adam makes whole steps.
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("mae sharded from one", "one"),
        ("mae ddp from sharded", "mae sharded"),
        ("mae sharded from ddp", "mae ddp"),
        ("one from sharded", "mae sharded"),
    ],
)
def test_runs_go_on_from_each_others_checkpoints(name: str, source: str, folder: Folder) -> None:
    assert [c.step for c in folder(name).checkpoints()] == [c.step for c in folder(source).checkpoints()]
    assert losses(folder(name)) == pytest.approx(losses(folder(source)), rel=1e-4)


def test_a_sharded_run_resumes_to_the_bit(folder: Folder) -> None:
    whole, resumed = folder("classifier sharded"), folder("classifier sharded from sharded")
    assert losses(whole) == losses(resumed)
    before, after = tensors(whole.checkpoints()[0]), tensors(resumed.checkpoints()[0])
    assert before.keys() == after.keys()
    assert any(name.startswith("ema/") for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_one_process_reads_it_and_writes_the_same_bytes(folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(folder("mae sharded").path, tmp_path / "run")
    recipe = folder("mae sharded").recipe().model_copy(update={"output": str(tmp_path / "run")})
    run = open_run(recipe)
    written = run.folder.checkpoints()[0].path
    before = {file.name: file.read_bytes() for file in written.glob("*.safetensors")}
    shutil.rmtree(written)
    save(run)
    assert {file.name: file.read_bytes() for file in written.glob("*.safetensors")} == before


@pytest.mark.parametrize("name", ["mae", "classifier"])
def test_evaluation_during_training_gives_ddps_numbers(name: str, folder: Folder) -> None:
    # Thirteen images for two processes: they run different numbers of forward passes.
    def numbers(how: str) -> list[dict[str, Any]]:
        rows = [row for row in folder(f"{name} {how}").metrics() if "loss" not in row]
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]

    assert numbers("ddp")
    for sharded, ddp in zip(numbers("sharded"), numbers("ddp"), strict=True):
        assert sharded.pop("data") == ddp.pop("data")
        assert sharded == pytest.approx(ddp, rel=1e-3)


@pytest.mark.parametrize("name", ["mae", "classifier"])
def test_an_export_is_the_same(name: str, folder: Folder, tmp_path: Path) -> None:
    out = {how: tmp_path / how for how in ("sharded", "ddp")}
    for how in out:
        # For a classifier's run it hands over to the export of classifiers.
        export(folder(f"{name} {how}").path, out[how])
    assert {f.name for f in out["sharded"].iterdir()} == {f.name for f in out["ddp"].iterdir()}
    assert (out["sharded"] / "config.json").read_bytes() == (out["ddp"] / "config.json").read_bytes()
    ours, theirs = (load_file(out[how] / "model.safetensors") for how in ("sharded", "ddp"))
    assert ours.keys() == theirs.keys()
    stored = tensors(folder(f"{name} sharded").checkpoints()[0])
    place = "ema/net." if name == "classifier" else "model/encoder."
    for key, value in ours.items():
        assert torch.equal(value, stored[place + key])
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=2e-4)


def test_the_units_are_the_blocks_and_the_rest_is_small(
    tiny_recipe: Callable[..., Recipe], tiny_classifier: Callable[..., FinetuneRecipe]
) -> None:
    """Names that recipes/accelerate/fsdp2_8gpu.yaml tells its readers."""
    mae, cross = tiny_recipe().build_model(), tiny_recipe("model.decoder=cross").build_model()
    classifier = tiny_classifier().build_model(num_classes=10)
    assert unit_names(mae) == unit_names(classifier) == ["Block"]
    assert unit_names(cross) == ["Block", "CrossBlock"]
    assert unit_names(cross, ["CrossBlock", "Block"]) == ["Block", "CrossBlock"]
    for model in (mae, cross, classifier):
        inside = {id(p) for block in model.transformer_blocks for p in block.parameters()}
        rest = {name.rsplit(".", 1)[0] for name, p in model.named_parameters() if id(p) not in inside}
        assert not [name for name in rest if "blocks" in name]
        assert {name.split(".")[1] for name in rest if "." in name} <= ROOT_MODULES


def test_other_networks_and_names_are_refused(tiny_classifier: Callable[..., FinetuneRecipe]) -> None:
    swin = tiny_classifier(
        "model={name: swin_tiny_patch4_window7_224}", "image_size=64", "curriculum=constant"
    ).build_model(num_classes=2)
    with pytest.raises(UserError, match=r"Vision Transformers only; train this model with DDP"):
        unit_names(swin)
    vit = tiny_classifier().build_model(num_classes=2)
    with pytest.raises(
        UserError, match=r"to_wrap is PatchEmbed .*; the blocks of this model are Block: leave"
    ):
        unit_names(vit, ["PatchEmbed"])


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FSDP_VERSION", "1", "fsdp_version is 1 .*; it must be 2"),
        (
            "FSDP_AUTO_WRAP_POLICY",
            "SIZE_BASED_WRAP",
            "fsdp_auto_wrap_policy is SIZE_BASED_WRAP .* TRANSFORMER_",
        ),
        (
            "FSDP_ACTIVATION_CHECKPOINTING",
            "true",
            r"fsdp_activation_checkpointing .* false: model.grad_check",
        ),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading is true .* must be false"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is true .* must be false"),
    ],
)
def test_settings_that_do_not_serve_are_one_sentence(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fsdp_plugin("bf16") is None
    for name, setting in fsdp_environment(FOLDER / "fsdp2_8gpu.yaml").items():
        monkeypatch.setenv(name, setting)
    assert fsdp_plugin("bf16") is not None
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said):
        fsdp_plugin("bf16")


def test_fp16_compiled_blocks_and_uneven_micro_batches_are_refused(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, setting in fsdp_environment(FOLDER / "fsdp2_8gpu.yaml").items():
        monkeypatch.setenv(name, setting)
    with pytest.raises(UserError, match="precision fp16 does not go together with FSDP2"):
        fsdp_plugin("fp16")

    def check(*overrides: str) -> None:
        recipe = tiny_recipe(*overrides)
        check_sharded(
            recipe.build_curriculum(64).stages,
            micro_batch_size=recipe.micro_batch_size,
            batch_size=recipe.batch_size,
            num_processes=2,
            compiled=recipe.model.compiled,
            whole_matrices=recipe.optim.name == "muon",
        )

    check("batch_size=10", "micro_batch_size=3")
    check("batch_size=11", "micro_batch_size=3")
    with pytest.raises(
        UserError, match=r"13 \(stage 1\) gives some of the 2 processes 2 .* others 3; .* of 2$"
    ):
        check("batch_size=13", "micro_batch_size=3")
    with pytest.raises(UserError, match=r"orthogonalises whole matrices, .*: use DDP, or"):
        check("optim.name=muon")
    with pytest.raises(UserError, match=r"model.compiled is true, .* leave it false"):
        check("model.compiled=true")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", r"with DeepSpeed.*; use FSDP2 .*\(.*fsdp2_8gpu.yaml\)$"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", r"with Megatron-LM.*; use FSDP2 .*\(.*fsdp2_8gpu.yaml\)$"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "True", "with use_parallelism_config.*; leave it false$"),
        ("ACCELERATE_USE_SAGEMAKER", "true", "with SageMaker's own processes; use torchrun"),
        (
            "ACCELERATE_DYNAMO_BACKEND",
            "INDUCTOR",
            "with dynamo_backend; .* model.compiled=true in the recipe$",
        ),
        ("ACCELERATE_USE_CPU", "perhaps", "cannot start as it is configured: invalid truth value perhaps$"),
    ],
)
def test_what_accelerate_is_told_and_a_run_cannot_do_is_one_sentence(
    variable: str, value: str, said: str, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said):
        pretrain(tiny_recipe())
    assert not RunFolder(tiny_recipe().output).path.exists()


def test_without_gpus_a_launch_for_fsdp_says_that_it_is_ddp(
    tiny_classifier: Callable[..., FinetuneRecipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has what FSDP2 needs")
    for name, setting in fsdp_environment(FOLDER / "fsdp2_8gpu.yaml").items():
        monkeypatch.setenv(name, setting)
    run = finetune(tiny_classifier("budget_epochs=0.3"))
    assert run.finished
    assert run.copies is None
    printed = capsys.readouterr()
    assert "warning: FSDP2 needs GPUs; here every process holds the whole model (DDP)" in printed.err
    assert not printed.out, "what a command prints there is its result"
