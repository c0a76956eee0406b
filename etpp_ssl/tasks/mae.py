"""Masked autoencoding: the same low-frequency crop feeds the encoder and the reconstruction target.

Legend: B batch, C channels, h, w pixels at the bandwidth, K kept patches, M predicted patches, V values per
patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from etpp_ssl.config import show_size
from etpp_ssl.curriculum.base import Stage
from etpp_ssl.curriculum.cost import Cost
from etpp_ssl.curriculum.frequency import low_frequency_crop
from etpp_ssl.data.loader import Batch
from etpp_ssl.data.views import EvalView, Normalise, TrainView
from etpp_ssl.evaluation.base import Probe, ProbeContext
from etpp_ssl.model.mae import AnyDecoder, MaskedAutoencoder, ModelConfig
from etpp_ssl.model.masking import MaskCounts, Masker, MaskRatioRamp
from etpp_ssl.model.patches import grid_of
from etpp_ssl.recipe import ProbedClassifier, Recipe
from etpp_ssl.targets.base import Objective
from etpp_ssl.tasks.base import Inputs, Shown, Task, blank_images
from etpp_ssl.tasks.mae_plan import attention_notes, decoder_flops, other_decoders
from etpp_ssl.weights.loading import load_init


class MaskedAutoencoding(Task):
    """Predict the masked patches of each image from the visible ones (MAE, section 3).

    Args:
        model: the masked autoencoder.
        view: the training view.
        normalise: uint8 images to float32.
        masker: says which patches are visible and which are predicted.
        objective: the reconstruction target and its loss.
        config: what the model was built from.
        image_size: (H, W) at full resolution.
        in_chans: C.
    """

    model: MaskedAutoencoder

    def __init__(
        self,
        model: MaskedAutoencoder,
        view: TrainView,
        normalise: Normalise,
        masker: Masker,
        objective: Objective,
        *,
        config: ModelConfig,
        image_size: tuple[int, int],
        in_chans: int,
    ) -> None:
        self.model = self.net = model
        self.view = view
        self.normalise = normalise
        self.masker = masker
        self.objective = objective
        self.config = config
        self.image_size = image_size
        self.in_chans = in_chans
        self.kernels = f"attention {config.attention}" + (", compiled" if config.compiled else "")
        self.probe: Probe | None = None

    @classmethod
    def of(cls, recipe: Recipe, model: MaskedAutoencoder, device: torch.device) -> MaskedAutoencoding:
        """The task of a recipe, without its probe."""
        return cls(
            model,
            recipe.crop_view(),
            recipe.normaliser(device),
            recipe.build_masker(),
            recipe.build_objective(),
            config=recipe.model,
            image_size=recipe.size,
            in_chans=recipe.in_chans,
        )

    def inputs(self, batch: Batch, stage: Shown) -> Inputs:
        """`images`, `ids_keep` int64 (B, K) and `ids_predict` int64 (B, M)."""
        images = low_frequency_crop(self.normalise(batch.images), stage.bandwidth)
        mask = self.masker(batch.sample_ids, stage.bandwidth, stage.progress)
        return {"images": images, "ids_keep": mask.ids_keep, "ids_predict": mask.ids_predict}

    def forward(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The predicted values, (B, M, V)."""
        values: Tensor = model(inputs["images"], inputs["ids_keep"], inputs["ids_predict"]).values_BMV
        return values

    def losses(self, output: Tensor, inputs: Inputs) -> dict[str, Tensor]:
        """See `Objective.losses`."""
        return self.objective.losses(output, inputs["ids_predict"], inputs["images"])

    def target(self, inputs: Inputs) -> Tensor:
        """The values to predict, float32 (B, M, V)."""
        return self.objective.target(inputs["images"], inputs["ids_predict"])

    def blank_inputs(self, stage: Shown) -> Inputs:
        """See `Task.blank_inputs`."""
        counts = self.masker.counts(stage.bandwidth, stage.progress)
        return {
            "images": blank_images(self.in_chans, stage.bandwidth),
            "ids_keep": torch.zeros(1, counts.num_keep, dtype=torch.int64, device="meta"),
            "ids_predict": torch.zeros(1, counts.num_predict, dtype=torch.int64, device="meta"),
        }

    def load_init(self, init: str, say: Callable[[str], None]) -> None:
        """See `etpp_ssl.weights.loading.load_init`."""
        load_init(self.model, init, say)

    def attach_probe(self, probe: Probe | None, every_steps: int | None) -> None:
        """Let `evaluate` run a probe.

        Args:
            probe: from `build_probe`, or None.
            every_steps: optimizer steps between two of its runs; None runs it after the last step only.
        """
        self.probe = probe
        self.evaluation = None if probe is None else "probe"
        self.evaluate_every = every_steps

    def evaluate(self, model: nn.Module) -> dict[str, float | None]:
        """The probe's numbers."""
        assert self.probe is not None
        assert isinstance(model, MaskedAutoencoder)
        return {**self.probe.run(model)}

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
        notes.append(
            f"encoder (target included) and decoder are in GFLOP per image, forward and backward; at full "
            f"resolution the {own.name} decoder takes {flops / 1e9:.4g} ({flops / full.flops:.0%}); "
            f"it would be {others} of this width, depth and heads that predicts every masked patch"
        )
        return notes

    def start_notes(self, stages: Sequence[Stage], precision: str) -> list[str]:
        """See `attention_notes`."""
        counts = [self.masker.counts(stage.bandwidth, stage.progress) for stage in stages]
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return attention_notes(self.model, counts, self.config.attention, dtype)

    def _decoder_flops(self, config: AnyDecoder, grid: tuple[int, int], counts: MaskCounts) -> int:
        return decoder_flops(config, self.model, grid, counts, self.objective.num_values)


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
    return recipe.probe.build(
        ProbeContext(
            accelerator=accelerator,
            open_split=recipe.open_split,
            view=EvalView(recipe.size, recipe.data.crop_pct),
            normalise=normalise,
            objective=objective,
            masker=recipe.build_masker() if isinstance(recipe, Recipe) else None,
            seed=recipe.seed,
            num_workers=recipe.data.num_workers,
            stall_seconds=recipe.data.stall_seconds,
            **long,
        )
    )
