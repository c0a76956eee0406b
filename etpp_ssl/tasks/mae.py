"""Masked autoencoding: the same low-frequency crop feeds the encoder and the reconstruction target.

Legend: B batch, C channels, h, w pixels at the bandwidth, K kept patches, M predicted patches, V values per
patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etpp_ssl.config import show_size
from etpp_ssl.curriculum.cost import Cost, count_cost
from etpp_ssl.curriculum.frequency import low_frequency_crop, pixels_with_data
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.views import EvalView, Normalise
from etpp_ssl.evaluation.base import Probe, ProbeContext
from etpp_ssl.messages import members_at, name_of
from etpp_ssl.model.mae import AnyDecoder, MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import MaskCounts, Masker, MaskRatioRamp
from etpp_ssl.model.patches import grid_of
from etpp_ssl.randomness import ShapesOnly
from etpp_ssl.recipe import ProbedClassifier, Recipe
from etpp_ssl.targets.base import Objective
from etpp_ssl.tasks.base import Inputs, Shown, Task, blank_images
from etpp_ssl.weights.loading import load_init


class MaskedAutoencoding(Task):
    """Predict the masked patches of each image from the visible ones (MAE, section 3).

    Args:
        recipe: says what is shown, masked and reconstructed.
        model: the masked autoencoder.
        device: of the images.
    """

    model: MaskedAutoencoder

    def __init__(self, recipe: Recipe, model: MaskedAutoencoder, device: torch.device) -> None:
        self.model = self.net = model
        self.normalise = recipe.normaliser(device)
        self.masker = recipe.build_masker()
        self.view = replace(recipe.crop_view(), enough=partial(shows_enough, self.masker))
        self.objective = recipe.build_objective()
        self.config = recipe.model
        self.image_size = recipe.size
        self.in_chans = recipe.in_chans
        compiled = ", compiled" if recipe.model.compiled else ""
        self.kernels = f"attention {recipe.model.attention}{compiled}"

    def inputs(self, batch: Batch, stage: Shown) -> Inputs:
        """`images`, `ids_keep` int64 (B, K) and `ids_predict` int64 (B, M).

        With drop-path also `sample_ids`, int64 (B,); of a batch with NaN also `valid`, bool (B, 1, h, w): the
        pixels that count.
        """
        images = low_frequency_crop(self.normalise(batch.images), stage.bandwidth)
        valid = None
        if batch.has_gaps:
            valid = self.masker.counted(pixels_with_data(batch.images, stage.bandwidth))
        mask = self.masker(batch.sample_ids, stage.bandwidth, stage.progress, valid)
        inputs = {"images": images, "ids_keep": mask.ids_keep, "ids_predict": mask.ids_predict}
        if self.config.drop_path:
            inputs["sample_ids"] = batch.sample_ids
        return inputs if valid is None else {**inputs, "valid": valid}

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The predicted values, (B, M, V)."""
        arguments = (inputs["images"], inputs["ids_keep"], inputs["ids_predict"], inputs.get("sample_ids"))
        values: Tensor = model(*arguments).values_BMV
        return values

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """See `Objective.losses`."""
        return self.objective.losses(output, inputs["ids_predict"], inputs["images"], inputs.get("valid"))

    def target(self, inputs: Inputs) -> Tensor:
        """The values to predict, float32 (B, M, V)."""
        images, ids_predict = inputs["images"], inputs["ids_predict"]
        if "valid" in inputs:
            return self.objective.target_with_gaps(images, ids_predict, inputs["valid"])[0]
        return self.objective.target(images, ids_predict)

    def blank_inputs(self, stage: Shown) -> Inputs:
        """See `Task.blank_inputs`."""
        counts = self.masker.counts(stage.bandwidth, stage.progress)
        sample_ids = {"sample_ids": torch.zeros(1, dtype=torch.int64, device="meta")}
        return {
            **(sample_ids if self.config.drop_path else {}),
            "images": blank_images(self.in_chans, stage.bandwidth),
            "ids_keep": torch.zeros(1, counts.num_keep, dtype=torch.int64, device="meta"),
            "ids_predict": torch.zeros(1, counts.num_predict, dtype=torch.int64, device="meta"),
        }

    def load_init(self, init: str, say: Callable[[str], None]) -> str | None:
        """See `etpp_ssl.weights.loading.load_init`."""
        return load_init(self.model, init, say)

    def describe(self) -> str:
        """See `Task.describe`."""
        decoder, masking = self.config.decoder.name, self.config.masking.name
        ratio = self.config.mask_ratio
        shown = f"{ratio.start:g} to {ratio.end:g}" if isinstance(ratio, MaskRatioRamp) else f"{ratio:g}"
        encoder_parameters = sum(p.numel() for p in self.model.encoder.parameters())
        parameters = sum(p.numel() for p in self.model.parameters())
        return (
            f"{self.config.name}, image {show_size(self.image_size)}, "
            f"patch {show_size(self.model.patch_size)}, {self.in_chans} channels, mask ratio {shown}"
            f"{f' ({masking})' if masking != 'uniform' else ''}: {encoder_parameters / 1e6:.2f} M parameters "
            f"in the encoder, {(parameters - encoder_parameters) / 1e6:.2f} M in the {decoder} decoder"
        )

    def plan_rows(self, stage: Shown, cost: Cost) -> dict[str, str]:
        """Grid, visible and predicted patches; GFLOP of encoder (target included) and decoder per image."""
        counts = self.masker.counts(stage.bandwidth, stage.progress)
        grid = grid_of(stage.bandwidth, self.model.patch_size)
        decoder = self._decoder_flops(self.config.decoder, grid, counts)
        return {
            "grid": f"{grid[0]}x{grid[1]}",
            "visible": str(counts.num_keep),
            "predicted": str(counts.num_predict),
            "encoder": f"{(cost.flops - decoder) / 1e9:.4g}",
            "decoder": f"{decoder / 1e9:.4g}",
        }

    def plan_notes(self, full: Cost) -> list[str]:
        """What the columns of the plan mean, and what other decoders would cost."""
        notes = []
        ratio = self.config.mask_ratio
        if isinstance(ratio, MaskRatioRamp):
            notes.append(
                f"the mask ratio goes from {ratio.start:g} to {ratio.end:g} over compute: patches and "
                f"operations are those of each stage's mean ratio (of the run's, for full resolution), "
                f"memory is of its heaviest"
            )
        own = self.config.decoder
        counts = self.masker.counts(self.image_size, 0.5)
        grid = grid_of(self.image_size, self.model.patch_size)
        flops = self._decoder_flops(own, grid, counts)
        others = ", ".join(
            f"{self._decoder_flops(other, grid, counts.everything) / 1e9:.4g} with a {other.name} decoder"
            for other in other_decoders(own)
        )
        quarter = counts._replace(num_predict=max(1, counts.everything.num_predict // 4))
        fewer = "".join(
            f"; a {config.name} decoder that predicts a quarter of them takes "
            f"{self._decoder_flops(config, grid, quarter) / 1e9:.4g}"
            for config in (own, *other_decoders(own))
            if "predict_ratio" in type(config).model_fields
        )
        notes.append(
            f"encoder (target included) and decoder are in GFLOP per image, forward and backward; at full "
            f"resolution the {own.name} decoder takes {flops / 1e9:.4g} ({flops / full.flops:.0%}); "
            f"it would be {others} of this width, depth and heads that predicts every masked patch{fewer}"
        )
        return notes

    def _decoder_flops(self, config: AnyDecoder, grid: tuple[int, int], counts: MaskCounts) -> int:
        return decoder_flops(config, self.model, grid, counts, self.objective.num_values)


def shows_enough(masker: Masker, view: Tensor, bandwidth: tuple[int, int], progress: float) -> bool:
    """Whether a view (C, H, W) with NaN has as many patches with data as its mask needs."""
    valid = masker.counted(pixels_with_data(view[None], bandwidth))
    return bool(masker.enough(valid, progress))


def build_probe(
    recipe: Recipe | ProbedClassifier,
    accelerator: Accelerator,
    normalise: Normalise,
    objective: Objective | None,
    **long: Any,
) -> Probe | None:
    """The recipe's probe, or None.

    Args:
        recipe: names it.
        accelerator, normalise, objective: the run's; a classifier has no objective.
        long: what a probe of hours may use; see `ProbeContext.folder` and what follows it.

    Raises:
        UserError: if the data does not serve it.
    """
    if recipe.probe.name == "none":
        return None
    # A decoder predicts as many channels as training shows; features are those of all.
    sampled = recipe.data.channel_sampling if recipe.probe.name == "reconstruction" else None
    return recipe.probe.build(
        ProbeContext(
            accelerator=accelerator,
            open_split=recipe.open_split,
            view=EvalView(recipe.size, recipe.data.crop_pct, sampled, recipe.seed),
            normalise=normalise,
            objective=objective,
            masker=recipe.build_masker() if isinstance(recipe, Recipe) else None,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            stall_seconds=recipe.data.stall_seconds,
            **long,
        )
    )


def decoder_flops(
    config: AnyDecoder,
    model: MaskedAutoencoder,
    grid: tuple[int, int],
    counts: MaskCounts,
    num_values: int,
) -> int:
    """Operations of a decoder behind a model's encoder, forward and backward, for one image.

    Args:
        config: the decoder, which need not be the model's own.
        model: the encoder's size is read from it; nothing is computed.
        grid: (h, w) patches.
        counts: patches of the image.
        num_values: numbers to predict per patch.
    """
    encoder = model.encoder
    prefix, width = encoder.num_prefix_tokens, encoder.embed_dim
    with ShapesOnly():
        decoder = config.build(
            encoder_dim=width,
            encoder_depth=len(encoder.blocks),
            num_prefix=prefix,
            base_grid=model.position_grid,
            num_values=num_values,
        )
        outputs = [
            torch.zeros(1, prefix + counts.num_keep, width, requires_grad=True)
            for _ in range(len(encoder.blocks) + 1 if config.reads_blocks else 1)
        ]
        ids_keep = torch.zeros(1, counts.num_keep, dtype=torch.int64)
        ids_predict = torch.zeros(1, counts.num_predict, dtype=torch.int64)

    def loss() -> Tensor:
        tokens = outputs if config.reads_blocks else outputs[0]
        values: Tensor = decoder(tokens, ids_keep, ids_predict, grid)
        return values.sum()

    return count_cost(loss, decoder).flops


def other_decoders(config: AnyDecoder) -> list[AnyDecoder]:
    """The decoders of other names, at the width, depth and heads of `config`."""
    shape = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads}
    kinds = members_at(ModelConfig, ["decoder"])
    return [kind.model_validate(shape) for kind in kinds if name_of(kind) != config.name]  # type: ignore[misc]
