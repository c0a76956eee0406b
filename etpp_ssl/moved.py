"""Modules of version 0.5 under their old names, for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NEW_HOMES = {
    "commands.embed": "engine.embed",
    "commands.evaluate": "engine.evaluate",
    "commands.prepare": "data.prepare",
    "commands.probe": "engine.probe",
    "curriculum.cost": "curriculum.segments",
    "curriculum.efficienttrain": "curriculum.constant",
    "data.augmentation": "data.erasing data.mixup",
    "data.formats.base": "data.images",
    "data.formats.jpeg": "data.picture",
    "data.formats.pillow": "data.decode",
    "data.shard_writer": "data.recode data.recode_pool",
    "data.sources.folder": "data.folder",
    "data.sources.shard_index": "data.shard_index",
    "data.sources.shards": "data.shards",
    "data.sources.splits": "data.indexed data.splits",
    "data.sources.synthetic": "data.synthetic",
    "data.sources.timm_dataset": "data.timm_dataset",
    "data.streams.base": "data.stream",
    "data.streams.huggingface": "data.huggingface",
    "data.streams.loader": "data.stream_loader",
    "data.streams.mix": "data.mix",
    "data.streams.webdataset": "data.webdataset",
    "data.streams.worker_shards": "data.lanes",
    "data.views": "data.augment data.probe_view",
    "data.workers": "data.reading data.time_limit data.watch data.worker",
    "debug.dumped_step": "engine.dumped_step",
    "debug.report": "engine.replay_report",
    "debug.reproduce": "engine.replay_nan engine.tracing",
    "dist.accelerator": "engine.accelerator engine.signals",
    "dist.peers": "engine.agreement engine.peers engine.same_start",
    "dist.sharding": "engine.fsdp engine.sharding",
    "evaluation.attentive": "evaluation.attention_pool evaluation.token_cache",
    "evaluation.base": "evaluation.labelled evaluation.selection",
    "evaluation.features": "evaluation.embeddings",
    "evaluation.linear_cached": "evaluation.heads",
    "evaluation.training": "evaluation.state",
    "export.card": "export.classifier_card",
    "export.folder": "export.plain",
    "export.official": "export.mae export.transformers",
    "export.timm": "export.classifier",
    "files": "atomic regular_file",
    "messages": "sentences",
    "model.attention": "model.blocks",
    "model.decoders": "model.cross_decoder model.decoder",
    "model.encoders": "model.vit",
    "model.mask_patterns": "model.block_masking model.grid_masking",
    "model.masking": "model.masker",
    "model.timm_net": "model.drop_path",
    "model.zoo.cswin": "model.cswin",
    "model.zoo.pvt": "model.pvt",
    "model.zoo.pyramid": "model.pyramid",
    "model.zoo.swin": "model.swin",
    "optim.groups": "optim.layer_decay",
    "optim.optimizers": "optim.classifier",
    "optim.schedules": "optim.schedule",
    "recipe_yaml": "data.file_list recipe_text",
    "report.figures": "report.curves",
    "report.markup": "report.svg",
    "report.page": "report.gallery",
    "report.panels": "report.channels report.glyphs report.targets",
    "report.reconstruction": "report.unnormalise",
    "report.tables": "report.differences report.sections report.stage_rows",
    "report.viewer": "report.pictures",
    "run_state": "engine.state",
    "targets.base": "objective.base",
    "targets.combined": "objective.combined",
    "targets.hog": "objective.hog",
    "targets.pixels": "objective.pixels",
    "tasks.base": "engine.replay_task",
    "tasks.classify": "objective.labels",
    "tasks.mae": "engine.decoder_cost engine.kernels",
    "train.batches": "engine.feed engine.streams",
    "train.checkpoint": "engine.checkpoint engine.rotation",
    "train.dump": "engine.dump",
    "train.launch": "engine.classifier_run engine.conduct engine.finetune engine.pretrain engine.run",
    "train.log": "engine.metrics engine.progress",
    "train.memory": "engine.host_memory engine.replay_memory",
    "train.nonfinite": "engine.nonfinite",
    "train.plan": "engine.classifier_plan engine.plan",
    "train.plan_table": "engine.plan_table",
    "train.records": "engine.records engine.status",
    "train.run": "engine.base_run engine.ema",
    "train.start": "engine.folder_lock engine.start",
    "train.time_budget": "engine.budget",
    "weights.adapt_classifier": "model.adapt_classifier model.adapt_head",
    "weights.layouts": "model.classifier_layouts model.huggingface model.interop",
    "weights.loading": "engine.initial_classifier engine.initial_weights engine.stored_weights model.adapt",
    "weights.official": "model.architecture",
    "weights.reading": "model.state_dict model.weights_file",
    "weights.tensors": "model.adapt_tensors",
}
"""Module -> the modules of 0.5 that have become it, or that have become it for the most part."""

OTHER_NAMES = {
    "config.is_neutral": "config.may_change_on_resume",
    "config.neutral": "config.may_change",
    "data.augment.to_bands": "data.views.to_channels",
    "data.images.DecodedPicture": "data.formats.pictures.DecodedPicture",
    "data.decode.EXTENSIONS": "data.formats.EXTENSIONS",
    "data.decode.decode": "data.formats.decode",
    "data.decode.from_picture": "data.formats.pillow.from_picture",
    "data.decode.most_bytes": "data.formats.most_bytes",
    "data.decode.one_line_reasons": "data.formats.base.one_line_reasons",
    "data.decode.open_image": "data.formats.pillow.open_image",
    "data.decode.orientation": "data.formats.pillow.orientation",
    "data.file_list.FileListConfig": "data.sources.folder.FileListConfig",
    "data.folder.expanded": "data.sources.base.expanded",
    "data.folder.printable": "data.sources.base.printable",
    "data.images.Bands": "data.formats.base.Channels",
    "data.images.DataConfig": "data.sources.base.DataConfig",
    "data.images.ImageSource": "data.sources.base.ImageSource",
    "data.images.Picture": "data.formats.base.Picture",
    "data.images.Region": "data.formats.base.Region",
    "data.images.UnreadableImage": "data.formats.base.UnreadableImage",
    "data.images.existing_folder": "data.sources.base.existing_folder",
    "data.lanes.ShardLane": "data.streams.worker_shards.ShuffledWorkerShard",
    "data.mix.MixedLane": "data.streams.mix.MixedWorkerShard",
    "data.picture.Box": "data.formats.base.Box",
    "data.picture.WholePicture": "data.formats.pictures.DecodedPicture",
    "data.picture.open_picture": "data.formats.open_picture",
    "data.stream.Lane": "data.streams.base.WorkerShard",
    "data.stream_loader.LanePlace": "data.streams.loader.WorkerShardPlace",
    "data.watch.Watch": "data.workers.MonitoredLoader",
    "engine.base_run.BaseRun": "train.run.Run",
    "engine.classifier_plan.plan_classifier": "train.plan.plan_run",
    "engine.classifier_plan.print_classifier_plan": "train.plan_table.print_plan",
    "engine.classifier_run.ClassifierRun": "train.run.Run",
    "engine.classifier_run.check_sizes": "model.timm_net.check_sizes",
    "engine.classifier_run.open_classifier_run": "train.opening.open_run",
    "engine.classifier_run.open_evaluation": "tasks.classify.open_evaluation",
    "engine.conduct.conduct": "train.launch.launch",
    "engine.signals.Interrupted": "config.Interrupted",
    "engine.ema.WeightAverage": "train.run.weight_average",
    "engine.feed.Feed": "train.batches.TrainingBatches",
    "engine.nonfinite.Guard": "train.nonfinite.NonFiniteCheck",
    "engine.replay_nan.Replayed": "debug.reproduce.Reproduction",
    "engine.replay_nan.replay_nan": "debug.reproduce.reproduce",
    "engine.replay_report.print_replay": "debug.report.print_report",
    "engine.replay_report.write_replay": "debug.report.write_report",
    "engine.run.Run": "train.run.Run",
    "engine.run.build_probe": "tasks.mae.build_probe",
    "engine.stored_weights.read_stored": "weights.loading.read_init",
    "evaluation.base.ProbeStopped": "config.Interrupted",
    "evaluation.embeddings.make_room": "files.check_place",
    "export.mae.LOAD": "export.official.LOAD_MAE",
    "export.mae.export": "export.official.export_mae",
    "export.transformers.LOAD": "export.official.LOAD_TRANSFORMERS",
    "export.transformers.export": "export.official.export_transformers",
    "model.architecture.HEADS_OF_WIDTH": "weights.tensors.HEADS_OF_WIDTH",
    "model.attention.SelfAttention": "model.timm_net.SelfAttention",
    "model.attention.use_attention": "model.timm_net.use_attention",
    "model.huggingface.to_huggingface": "export.official.to_huggingface",
    "model.interop.MAE_DECODER_HEADS": "weights.official.MAE_DECODER_HEADS",
    "model.interop.load_official_mae": "weights.official.load_official_mae",
    "model.interop.official_names": "export.official.official_names",
    "model.masking.UniformMaskingConfig": "model.mask_patterns.UniformMaskingConfig",
    "model.masking.keyed_order": "model.mask_patterns.keyed_order",
    "optim.schedule.OptimConfig": "optim.optimizers.OptimConfig",
    "recipe.AnyCurriculum": "recipe_base.AnyCurriculum",
    "recipe.AnyData": "recipe_base.AnyData",
    "recipe.AnyStream": "recipe_base.AnyStream",
    "recipe.CheckpointConfig": "recipe_base.CheckpointConfig",
    "recipe.NonfiniteConfig": "recipe_base.NonfiniteConfig",
    "recipe.TrackerConfig": "recipe_base.TrackerConfig",
    "recipe_file.load_any_recipe": "recipe.load_any",
    "recipe_file.load_finetune_recipe": "recipe.FinetuneRecipe.load",
    "recipe_file.load_recipe": "recipe.Recipe.load",
    "recipe_file.parse_any_recipe": "recipe.parse_any",
    "recipe_file.parse_finetune_recipe": "recipe.FinetuneRecipe.parse",
    "recipe_file.parse_recipe": "recipe.Recipe.parse",
    "report.sections.probes": "report.results.result_tables",
    "report.pictures.Picture": "report.viewer.InputImage",
}
"""Names that have changed, or that stand elsewhere than most of their module."""

_HOMES = {old: new for new, olds in NEW_HOMES.items() for old in olds.split()}
_PACKAGES = {"engine": "train", "objective": "targets"}


class _OldModules:
    """Makes a module of an old name that hands on to the new one; asked last, for what is not there.

    It has not the base classes of a finder and loader: their import takes longer than that of etpp_ssl.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("etpp_ssl.")
        if old in _PACKAGES or old in _HOMES or old == "engine.base_run":
            return ModuleSpec(fullname, self, is_package=old in _PACKAGES)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__.removeprefix("etpp_ssl.")
        if old in _PACKAGES:
            return
        new = _HOMES.get(old, "train.run")
        warnings.warn(
            f"etpp_ssl.{old} has become etpp_ssl.{new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )

        def __getattr__(name: str) -> Any:  # noqa: N807
            home, _, called = OTHER_NAMES.get(f"{old}.{name}", f"{new}.{name}").rpartition(".")
            return getattr(importlib.import_module(f"etpp_ssl.{home}"), called)

        module.__dict__["__getattr__"] = __getattr__


def names_of(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that is where it was, but has given up names of 0.5.

    Args:
        module: without `etpp_ssl.`.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807
        new = OTHER_NAMES.get(f"{module}.{name}")
        if new is None:
            raise AttributeError(f"module 'etpp_ssl.{module}' has no attribute {name!r}")
        import pkgutil

        warnings.warn(
            f"etpp_ssl.{module}.{name} has become etpp_ssl.{new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return pkgutil.resolve_name(f"etpp_ssl.{new}")

    return __getattr__


def install() -> None:
    """Let the old names be imported."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())
