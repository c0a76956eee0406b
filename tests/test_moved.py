"""Modules and names of version 0.5 are importable from where they were, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys

import pytest

from etpp_ssl.moved import NEW_HOMES, OTHER_NAMES

OLD = [(old, new) for new, olds in NEW_HOMES.items() for old in olds.split()]
PUBLIC = [
    "atomic.write_text",
    "curriculum.efficienttrain.EfficientTrain",
    "curriculum.frequency.low_frequency_crop",
    "data.augment.EvalView",
    "data.augment.Normalise",
    "data.augment.TrainView",
    "data.images.DataConfig",
    "data.splits.open_split",
    "engine.accelerator.open_accelerator",
    "engine.budget.decide_steps",
    "engine.checkpoint.save_checkpoint",
    "engine.finetune.finetune",
    "engine.initial_weights.load_init",
    "engine.plan.plan_run",
    "engine.pretrain.pretrain",
    "engine.run.open_run",
    "engine.signals.Interrupted",
    "engine.state.TrainState",
    "model.interop.recognise",
    "model.mae.MaskedAutoencoder",
    "model.masker.Masker",
    "model.masking.random_masking",
    "model.state_dict.load_weights",
    "objective.base.Objective",
    "objective.hog.hog_features",
    "objective.labels.soft_target_cross_entropy",
    "optim.layer_decay.parameter_groups",
    "optim.schedule.OptimConfig",
    "sentences.validation_sentence",
]


def forget(module: str) -> None:
    sys.modules.pop(f"etpp_ssl.{module}", None)


@pytest.mark.parametrize(("old", "new"), OLD, ids=[old for old, _ in OLD])
def test_an_old_module_names_the_one_that_it_has_become(old: str, new: str) -> None:
    forget(old)
    with pytest.warns(DeprecationWarning, match=f"etpp_ssl.{old} has become etpp_ssl.{new};"):
        importlib.import_module(f"etpp_ssl.{old}")
    importlib.import_module(f"etpp_ssl.{new}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", [*PUBLIC, *OTHER_NAMES])
def test_a_public_name_is_where_it_was(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(f"etpp_ssl.{module}"), name) is not None


def test_a_name_that_left_its_module_is_warned_about() -> None:
    masking = importlib.import_module("etpp_ssl.model.masking")
    with pytest.warns(DeprecationWarning, match=r"keyed_order has become etpp_ssl\.model\.mask_patterns"):
        assert callable(masking.keyed_order)
    assert not hasattr(masking, "nothing")


def test_what_is_not_there_is_an_error_as_ever() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"etpp_ssl\.engine\.nothing"):
        importlib.import_module("etpp_ssl.engine.nothing")
    forget("objective.hog")
    with pytest.warns(DeprecationWarning, match="has become"):
        old = importlib.import_module("etpp_ssl.objective.hog")
    assert not hasattr(old, "nothing")
