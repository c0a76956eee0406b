"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Mapping

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from etpp_ssl.train.checkpoint import load_tensors


class WeightAverage:
    """A second model whose weights follow a trained one's, by timm's `ModelEmaV3`.

    With d the decay and w_k the weights after step k, the average after step n is
    d^(n-1) w_1 + (1-d) (d^(n-2) w_2 + ... + d w_(n-1) + w_n): the first step replaces the untrained
    weights. Parameters and floating-point buffers are averaged, in float32; integer buffers are copied.
    What it does at a step depends on that step's number alone, so the average is exactly its `state_dict`.

    Args:
        model: the bare model on its device, neither compiled nor wrapped for several processes; of a
            sharded one a copy of the parts (`Copies.parts`), which then are averaged each on its process.
        decay: d, in (0, 1).
        warmup: take min(d, 1 - k^(-2/3)) at step k instead, so that a short run forgets its beginning.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self._average = ModelEmaV3(model, decay=decay, use_warmup=warmup)
        self.model: nn.Module = self._average.module.float().requires_grad_(False)
        """The model with averaged weights, in eval mode, without gradients."""

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights of `model`.

        BatchNorm's statistics are those of this process, which sees its part of each batch only.

        Args:
            model: the trained model.
            step: number of finished optimizer steps, from 1 on.
        """
        self._average.update(model, step=step)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's own names; of a sharded model this process's parts."""
        return dict(self.model.state_dict())

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """The inverse of `state_dict`; see `etpp_ssl.train.checkpoint.load_tensors`."""
        load_tensors(self.model, tensors, source)
