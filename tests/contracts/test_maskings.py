"""What every mask pattern promises; a new `...MaskingConfig` in etpp_ssl/model is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import etpp_ssl.model
from etpp_ssl.curriculum.efficienttrain import EfficientTrain
from etpp_ssl.messages import members_at
from etpp_ssl.model.mae import ModelConfig
from etpp_ssl.model.masking import Masker, num_visible

PATCH = (16, 8)
BANDWIDTHS = [
    stage.bandwidth
    for size in ((96, 160), (224, 224))
    for stage in EfficientTrain(
        "deit", image_size=size, multiple=PATCH, num_images=100, batch_size=4, budget_epochs=1.0
    ).stages
]
# The default block of Pixio suits its own grids; at these bandwidths it follows the scene.
SETTINGS: dict[str, dict[str, Any]] = {"aligned": {"block": 2, "unit": "scene"}}
BASE_GRID = (14, 28)
POSITIONS = torch.tensor([12, 5, 2**33, 7, 12])


def masking_configs() -> list[type[BaseModel]]:
    """The Config classes of the model package that are mask patterns."""
    found = []
    for module_info in pkgutil.iter_modules(etpp_ssl.model.__path__, etpp_ssl.model.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for name, member in vars(module).items():
            if name.endswith("MaskingConfig") and member.__module__ == module.__name__:
                found.append(member)
    return found


CONFIGS = masking_configs()
every_pattern = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_fields["name"].default)
every_bandwidth = pytest.mark.parametrize("bandwidth", BANDWIDTHS)
every_ratio = pytest.mark.parametrize("ratio", [0.5, 0.6, 0.75, 0.9])


def make_masker(
    config: type[BaseModel], ratio: Any = 0.75, predict: float | None = None, seed: int = 4
) -> Masker:
    name = config.model_fields["name"].default
    pattern: Any = config(**SETTINGS.get(name, {}))
    return Masker(pattern, ratio, predict, PATCH, seed, base_grid=BASE_GRID)


def test_the_search_finds_the_patterns_that_recipes_know_and_no_name_twice() -> None:
    names = [config.model_fields["name"].default for config in CONFIGS]
    assert {"uniform", "block", "aligned", "grid"} <= set(names)
    assert len(names) == len(set(names))
    assert set(CONFIGS) == set(members_at(ModelConfig, ["masking"]))


@every_pattern
@every_bandwidth
@every_ratio
def test_the_counts_are_exact_and_the_sets_ascending_and_apart(
    config: type[BaseModel], bandwidth: tuple[int, int], ratio: float
) -> None:
    num_patches = bandwidth[0] * bandwidth[1] // (PATCH[0] * PATCH[1])
    num_keep = num_visible(num_patches, ratio)
    for predict, num_predict in ((None, num_patches - num_keep), (0.3, round(0.3 * num_patches))):
        mask = make_masker(config, ratio, predict)(torch.arange(40), bandwidth, 0.3)
        for ids, count in ((mask.ids_keep, num_keep), (mask.ids_predict, num_predict)):
            assert ids.dtype == torch.int64
            assert ids.shape == (40, count)
            assert ids.min() >= 0
            assert ids.max() < num_patches
            assert (ids.diff(dim=1) > 0).all()
        both = torch.cat(list(mask), dim=1).sort(dim=1).values
        assert (both.diff(dim=1) > 0).all()


@every_pattern
@every_bandwidth
def test_a_samples_mask_does_not_depend_on_its_batch(
    config: type[BaseModel], bandwidth: tuple[int, int]
) -> None:
    masker = make_masker(config, predict=0.4)
    together = masker(POSITIONS, bandwidth, 0.3)
    order = torch.tensor([3, 1, 4, 0, 2])
    turned = masker(POSITIONS[order], bandwidth, 0.9)
    for ids, reordered in zip(together, turned, strict=True):
        assert torch.equal(ids[0], ids[4])
        assert torch.equal(reordered, ids[order])
    for row, position in enumerate(POSITIONS):
        alone = masker(position[None], bandwidth, 0.0)
        for ids, single in zip(together, alone, strict=True):
            assert torch.equal(single[0], ids[row])


@every_pattern
def test_it_neither_reads_nor_moves_the_global_generator(config: type[BaseModel]) -> None:
    masker = make_masker(config, predict=0.4)
    torch.manual_seed(0)
    first = masker(POSITIONS, (96, 160), 0.0)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(a, b) for a, b in zip(first, masker(POSITIONS, (96, 160), 0.0), strict=True))


@every_pattern
def test_samples_and_seeds_have_masks_and_subsets_of_their_own(config: type[BaseModel]) -> None:
    for choose in range(2):
        seen = [
            make_masker(config, 0.7, 0.4, seed=seed)(torch.arange(50), (224, 224), 0.0)[choose]
            for seed in (0, 1, -1)
        ]
        rows = torch.cat(seen)
        assert len(rows.unique(dim=0)) == len(rows)


@every_pattern
def test_every_patch_is_visible_sometimes_and_predicted_sometimes(config: type[BaseModel]) -> None:
    mask = make_masker(config, predict=0.25)(torch.arange(3000), (96, 160), 0.0)
    for ids in mask:
        share = torch.zeros(3000, 120).scatter(1, ids, 1.0).mean(dim=0)
        assert share.min() > 0.05
        assert share.max() < 0.95


def masks_with_gaps(
    config: type[BaseModel], num_images: int, share: float, predict: float | None = None
) -> tuple[Any, Any, torch.Tensor]:
    """Masks without and with gaps on 6 x 20 patches, and which of these have data, bool (B, N)."""
    masker = make_masker(config, predict=predict)
    has_data = torch.rand(num_images, 120, generator=torch.Generator().manual_seed(0)) < share
    valid = has_data.view(num_images, 1, 6, 20).repeat_interleave(16, 2).repeat_interleave(8, 3)
    samples = torch.arange(num_images)
    return masker(samples, (96, 160), 0.0), masker(samples, (96, 160), 0.0, valid), has_data


@every_pattern
@pytest.mark.parametrize("predict", [None, 0.3])
def test_patches_without_data_are_not_visible_and_predicted_last(
    config: type[BaseModel], predict: float | None
) -> None:
    whole, mask, has_data = masks_with_gaps(config, 200, 0.5, predict)
    assert has_data.sum(dim=1).min() > 30
    for ids, plain in zip(mask, whole, strict=True):
        assert ids.shape == plain.shape
        assert ids.dtype == torch.int64
        assert (ids.diff(dim=1) > 0).all()
    both = torch.cat(list(mask), dim=1).sort(dim=1).values
    assert (both.diff(dim=1) > 0).all()
    assert has_data.gather(1, mask.ids_keep).all()
    predicted = has_data.gather(1, mask.ids_predict).sum(dim=1)
    assert torch.equal(predicted, (has_data.sum(dim=1) - 30).clamp(max=mask.ids_predict.shape[1]))
    # What was visible and has data stays so.
    stays = torch.zeros(200, 120, dtype=torch.bool).scatter(1, whole.ids_keep, True) & has_data
    assert stays.any()
    assert not (stays & ~torch.zeros_like(stays).scatter(1, mask.ids_keep, True)).any()


@every_pattern
def test_a_whole_image_keeps_its_mask_among_others_with_gaps(config: type[BaseModel]) -> None:
    masker = make_masker(config, predict=0.4)
    valid = torch.rand(5, 1, 96, 160, generator=torch.Generator().manual_seed(0)) < 0.01
    valid[::2] = True
    for plain, ids in zip(
        masker(POSITIONS, (96, 160), 0.2), masker(POSITIONS, (96, 160), 0.2, valid), strict=True
    ):
        assert torch.equal(plain[::2], ids[::2])
        assert not torch.equal(plain[1::2], ids[1::2])


@every_pattern
def test_too_few_patches_with_data_still_give_a_whole_mask_and_are_told(config: type[BaseModel]) -> None:
    masker = make_masker(config)
    valid = torch.zeros(3, 1, 96, 160, dtype=torch.bool)
    # 30 of 120 patches are visible, and a quarter of the others is 22.5: 53 must have data.
    valid[0, :, :16] = True
    valid[1, :, :, :72] = True
    valid[2, :, :, :72] = valid[2, :, 80:] = valid[2, :, :, 80:88] = True
    assert [int(masker._has_data(v[None]).sum()) for v in valid] == [20, 54, 70]
    assert masker.enough(valid, 0.0).tolist() == [False, True, True]
    valid[1, :, :32, 64:72] = False
    assert masker.enough(valid, 0.0).tolist() == [False, False, True]
    mask = masker(torch.arange(3), (96, 160), 0.0, valid)
    assert mask.ids_keep.shape == (3, 30)
    assert set(range(20)) <= set(mask.ids_keep[0].tolist())
