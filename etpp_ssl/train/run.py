"""Opening a run: everything is checked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Curriculum
from etpp_ssl.data.sources.base import ImageSource
from etpp_ssl.data.sources.splits import open_split
from etpp_ssl.data.training import TrainingImages, open_training
from etpp_ssl.data.views import EvalView, Normalise, TrainView
from etpp_ssl.dist.accelerator import open_accelerator
from etpp_ssl.dist.fsdp import prepare, sharding_in_use
from etpp_ssl.dist.peers import with_peers
from etpp_ssl.dist.sharding import WholeModelProbe
from etpp_ssl.evaluation.base import Probe, ProbeContext
from etpp_ssl.model.mae import MaskedAutoencoder
from etpp_ssl.model.masking import Masker
from etpp_ssl.optim.groups import weight_decay_groups
from etpp_ssl.randomness import derive_key
from etpp_ssl.recipe import Recipe, RunRecipe
from etpp_ssl.run_folder import RunFolder
from etpp_ssl.targets.base import Objective
from etpp_ssl.train.base_run import BaseRun
from etpp_ssl.train.checkpoint import load_checkpoint
from etpp_ssl.train.kernels import kernels_in_use
from etpp_ssl.train.memory import check_host_memory, check_replay, replay_notes
from etpp_ssl.train.metrics import MetricsFile
from etpp_ssl.train.progress import Progress
from etpp_ssl.train.start import prepare_folder, starting_point
from etpp_ssl.train.state import TrainState, environment, environment_changes
from etpp_ssl.train.streams import check_stream
from etpp_ssl.weights.loading import load_init


@dataclass(kw_only=True)
class Run(BaseRun):
    """A pre-training run."""

    recipe: Recipe
    view: TrainView
    masker: Masker
    objective: Objective
    bare_model: MaskedAutoencoder
    probe: Probe | None


@with_peers()
def open_run(recipe: Recipe, fork: Path | None = None) -> Run:
    """Open a recipe's run folder: a new run, or the newest checkpoint of the one that is there.

    Nothing is written; see `prepare_run`.

    Args:
        recipe: the run.
        fork: another run folder to start from: its newest checkpoint's weights, optimizer and step go
            into a new folder under this recipe, whose schedules hold from that step on.

    Raises:
        UserError: for anything wrong with recipe, data, folder or checkpoint.
    """
    accelerator = open_accelerator(recipe)
    source = open_training_images(recipe)
    curriculum = recipe.build_curriculum(len(source))
    masker = recipe.build_masker()
    for stage, span in zip(curriculum.stages, curriculum.spans, strict=True):
        masker.check(stage.bandwidth, span)
    progress = Progress(curriculum, visible=accelerator.is_main_process)
    check_host_memory(recipe, recipe.build_model)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_key(recipe.seed, "init") >> 1)
        model = recipe.build_model()
    optimizer = torch.optim.AdamW(
        weight_decay_groups(
            model, weight_decay=recipe.optim.weight_decay, decay_tokens=recipe.optim.decay_tokens
        ),
        lr=0.0,
        betas=recipe.optim.betas,
        eps=recipe.optim.eps,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    mean, std = recipe.data.statistics(recipe.in_chans)
    normalise = Normalise(mean, std, accelerator.device)
    objective = recipe.build_objective()
    probe = build_probe(recipe, accelerator, normalise, objective)
    folder = RunFolder(recipe.output)
    start, state = starting_point(recipe, folder, source, curriculum, fork, progress.say)
    if recipe.init is not None and start is None:
        load_init(model, recipe.init, progress.say)
    if state.plan is not None:
        curriculum = progress.curriculum = curriculum.laid_out(state.plan.segments)
    check_start(recipe, source, curriculum, state, accelerator.num_processes)
    kernels = kernels_in_use(recipe) + sharding_in_use(accelerator)
    prepared, prepared_optimizer, copies = prepare(accelerator, recipe, curriculum, model, optimizer)
    if probe is not None and copies is not None:
        probe = WholeModelProbe(probe, copies)
    if start is not None:
        restore(accelerator, load_checkpoint(start, model, optimizer), kernels, progress)
    return Run(
        recipe=recipe,
        folder=folder,
        accelerator=accelerator,
        curriculum=curriculum,
        source=source,
        view=crop_view(recipe),
        normalise=normalise,
        masker=masker,
        objective=objective,
        model=prepared,
        bare_model=model,
        copies=copies,
        optimizer=prepared_optimizer,
        probe=probe,
        state=state,
        metrics=MetricsFile(folder, accelerator, progress.say),
        progress=progress,
        kernels=kernels,
        data_fingerprint=source.fingerprint(),
    )


def crop_view(recipe: RunRecipe) -> TrainView:
    """The random resized crop and mirror of a recipe."""
    return TrainView(
        image_size=recipe.size,
        crop_scale=recipe.data.crop_scale,
        flip=recipe.data.flip,
        lanczos=recipe.curriculum.crop == "lanczos",
        seed=recipe.seed,
        decode=recipe.data.decode,
        interpolation=recipe.data.interpolation,
        decoder=recipe.data.decoder,
    )


def check_start(
    recipe: RunRecipe, source: TrainingImages, curriculum: Curriculum, state: TrainState, num_processes: int
) -> None:
    """See that a run can go on from its state with so many processes.

    Raises:
        UserError: if not.
    """
    for stage in curriculum.stages:
        if stage.batch_size < num_processes:
            raise UserError(
                f"batch_size {stage.batch_size} (stage {stage.index + 1}) is smaller than the "
                f"{num_processes} processes; each needs at least one image per step"
            )
    if state.step > curriculum.num_steps:
        raise UserError(
            f"checkpoint of step {state.step} is beyond this recipe's {curriculum.num_steps} steps"
        )
    check_replay(recipe, curriculum, num_processes, state.step)
    check_stream(recipe, source, curriculum, state, num_processes)


def restore(accelerator: Accelerator, saved: dict[str, Any], kernels: str, progress: Progress) -> None:
    """Bring back what a checkpoint holds beside the tensors, and say what may change the last bits.

    Args:
        accelerator: as it prepared the model.
        saved: the checkpoint's state.
        kernels: those of now.
        progress: told of changes.
    """
    if accelerator.scaler is not None and saved.get("scaler"):
        accelerator.scaler.load_state_dict(saved["scaler"])
    changes = environment_changes(
        saved["environment"], environment(accelerator.num_processes, accelerator.device, kernels)
    )
    if changes:
        progress.say(f"warning: the last bits may differ from the run so far: {', '.join(changes)}")


def prepare_run(run: BaseRun, notes: Sequence[str] = ()) -> None:
    """Create the folder of a run that is about to train, or bring it back to where the run stands.

    Args:
        run: the run.
        notes: what else to say about it.

    Raises:
        UserError: on all processes, if the disk is too full, the folder cannot be written to, or another
            process trains in it.
    """
    # The other processes may still be reading what the main one is about to change.
    run.accelerator.wait_for_everyone()
    fault = ""
    if run.accelerator.is_main_process:
        num_parameters = sum(parameter.numel() for parameter in run.bare_model.parameters())
        try:
            prepare_folder(run.folder, run.recipe, run.state, num_parameters, run.metrics, run.lock)
        except UserError as error:
            fault = str(error)
    fault = run.agreement.main_says(fault)
    if fault:
        raise UserError(fault)
    for note in (*replay_notes(run.recipe, run.curriculum), *notes):
        run.progress.say(note)
    if run.recipe.tracker.name != "none":
        run.accelerator.init_trackers(run.recipe.tracker.project)


def build_probe(
    recipe: Recipe, accelerator: Accelerator, normalise: Normalise, objective: Objective, **long: Any
) -> Probe | None:
    """The recipe's probe, or None.

    Args:
        recipe: names it.
        accelerator, normalise, objective: the run's.
        long: what a probe of hours may use; see `ProbeContext.folder` and what follows it.

    Raises:
        UserError: if the data does not serve it.
    """
    if recipe.probe.name == "none":
        return None

    def open_one(split: str) -> ImageSource:
        return open_split(
            recipe.data, split, in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed
        )

    return recipe.probe.build(
        ProbeContext(
            accelerator=accelerator,
            open_split=open_one,
            view=EvalView(recipe.size, recipe.data.crop_pct),
            normalise=normalise,
            objective=objective,
            masker=recipe.build_masker(),
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            stall_seconds=recipe.data.stall_seconds,
            **long,
        )
    )


def open_training_images(recipe: RunRecipe) -> TrainingImages:
    """The images that a recipe trains on.

    Raises:
        UserError: if they are not there, or another number than the recipe says.
    """
    recipe.data.statistics(recipe.in_chans)
    source = open_training(recipe.data, in_chans=recipe.in_chans, image_size=recipe.size, seed=recipe.seed)
    expected = recipe.data.stated_images
    if expected is not None and expected != len(source):
        raise UserError(
            f"data.num_images is {expected}, but the data has {len(source)} images; "
            f"data.num_images=null takes what is there"
        )
    return source
