"""Any timm classifier at any bandwidth, with one set of parameters.

Legend: B batch, C channels, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from etpp_ssl.config import MAX_SIDE, UserError, may_change, show_size
from etpp_ssl.messages import shown
from etpp_ssl.model.attention import AttentionName
from etpp_ssl.model.encoders import EXPLICIT_NAME, VIT_DIMS, EncoderConfig, encoder_args, transformer_of
from etpp_ssl.model.lora import LoraLayers, add_adapters, check_called, layers_to_adapt
from etpp_ssl.model.trained_parts import LAST, WAYS, freeze, frozen_to_eval, heads_of

OWN_KEYS = {
    "img_size": "image_size",
    "in_chans": "in_chans",
    "num_classes": "model.num_classes",
    "drop_path_rate": "model.drop_path",
    "global_pool": "model.global_pool",
}
"""Arguments of timm that have a key of their own in a recipe."""


class ClassifierConfig(EncoderConfig):
    """A timm classifier by name, or a ViT by explicit dimensions, which only Vision Transformers have."""

    name: str = "vit_base_patch16_224"
    """Any timm classifier whose size can change, or `vit` with `patch_size`, `embed_dim`, `depth` and
    `num_heads`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments for `timm.create_model`."""
    num_classes: int | None = Field(default=None, ge=1, le=10**6)
    """None is the number of classes of the data."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Rate of the last block; from block to block it grows linearly from 0, as timm's networks have it."""
    global_pool: Literal["avg", "token"] | None = None
    """What the classifier reads: the mean over patches (a ViT then normalises behind it, by `fc_norm`, as
    MAE's fine-tuning does), or the class token; None is the named model's own."""
    head: Literal["random", "linear"] = "random"
    """What the head starts from: random weights, or the linear classifier that the sweep of
    `probe=linear_cached` finds on frozen features of the network that `init` names. All weights are then
    trained from there (linear probing, then fine-tuning: Kumar et al., ICLR 2022)."""
    head_init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of the head's truncated normal initialisation (MAE's fine-tuning: 2e-5); None
    leaves timm's."""
    train: str = "all"
    """What is trained; the rest is frozen, in evaluation mode: `all`; `head`, the classifier alone (not an
    `fc_norm` in front of it, whose scale and shift add nothing that the classifier's weights cannot do);
    `norms`, scales and shifts of all norm layers, with the statistics of batch norms; `last_N`, the last N
    blocks and the final norm; `lora`, low-rank adapters on linear layers, which whatever reads the run merges
    into the weights. The head is trained in each."""
    lora_rank: int = Field(default=8, ge=1, le=MAX_SIDE)
    """Of `train=lora`: width r of the adapters."""
    lora_alpha: float = Field(default=8.0, gt=0, le=1e6)
    """Of `train=lora`: an adapter's output is scaled by alpha / r."""
    lora_layers: LoraLayers = "attention"
    """Of `train=lora`: the linear layers of `attention`, or `all`, those of the MLPs among them."""
    attention: AttentionName = may_change("auto")
    """Kernel of plain self-attention in training, as in pre-training: `fused` (torch's), `unfused` (plain
    products), or `auto`, what measured faster on the device; they differ by rounding."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more compute. BatchNorm's running
    statistics then take in each batch twice."""

    @field_validator("args")
    @classmethod
    def _leaves_other_keys_alone(cls, args: dict[str, Any]) -> dict[str, Any]:
        for key, value in args.items():
            largest = 1000 if "depth" in key or "layers" in key else MAX_SIDE
            if _beyond(value, largest):
                raise ValueError(f"{key} is {shown(value)}; numbers in it must be at most {largest}")
            if key in OWN_KEYS:
                raise ValueError(f"{key} is {value!r} here; it is set by the key {OWN_KEYS[key]}")
            if key.startswith("dynamic_img") or key == "strict_img_size":
                raise ValueError(
                    f"{key} is {value!r}; it must be left out, every size of a run is taken care of"
                )
            if "drop" in key and value:
                raise ValueError(
                    f"{key} is {value!r}; it must be 0, because dropout's draws cannot be keyed by sample "
                    "(model.drop_path can)"
                )
        return args

    @field_validator("train")
    @classmethod
    def _is_a_way_to_train(cls, train: str) -> str:
        if train not in ("all", "head", "norms", "lora") and LAST.fullmatch(train) is None:
            raise ValueError(f"it must be one of {WAYS}, not {shown(train)}")
        return train

    @model_validator(mode="after")
    def _lora_is_asked_for(self) -> ClassifierConfig:
        # Compared with the default, because a run's resolved recipe holds every key.
        for key in ("lora_rank", "lora_alpha", "lora_layers"):
            value = getattr(self, key)
            if self.train != "lora" and value != type(self).model_fields[key].default:
                raise ValueError(f"{key} is {value}, but train is {self.train}: it is for train=lora")
        return self

    @model_validator(mode="after")
    def _pools_what_there_is(self) -> ClassifierConfig:
        if self.class_token is False and self.global_pool == "token":
            raise ValueError("global_pool is 'token' and class_token is false; without one it must be 'avg'")
        return self

    def timm_args(
        self, image_size: tuple[int, int], in_chans: int, num_classes: int
    ) -> tuple[str, dict[str, Any]]:
        """timm's architecture name and the arguments that rebuild the network at full resolution.

        `timm.create_model(architecture, **args)` has its parameters, and its outputs to the last bit.

        Args:
            image_size: (H, W) in pixels at full resolution.
            in_chans: C.
            num_classes: of the data, where the config does not say it.

        Raises:
            UserError: if the network is unknown, or does not take what the config asks for.
        """
        from etpp_ssl.model.timm_net import accepted_arguments

        architecture, dims = self._dims(image_size, in_chans)
        accepted = accepted_arguments(architecture)
        args: dict[str, Any] = {**dims, **self.args, "in_chans": in_chans}
        args["num_classes"] = self.num_classes or num_classes
        if "img_size" in accepted:
            args["img_size"] = list(image_size)
        if "drop_path_rate" in accepted:
            args["drop_path_rate"] = self.drop_path
        elif self.drop_path:
            raise UserError(f"model.drop_path is {self.drop_path}, but {architecture} has none: it must be 0")
        pool = "avg" if self.class_token is False else self.global_pool
        if pool is not None:
            args["global_pool"] = pool
        return architecture, args

    def multiple(self, image_size: tuple[int, int], in_chans: int) -> tuple[int, int]:
        """What divides every legal bandwidth, per axis in pixels: a ViT's patch, or the total stride."""
        from etpp_ssl.model.timm_net import stride

        # The number of classes changes no size.
        return stride(*self.timm_args(image_size, in_chans, num_classes=2))

    def check(
        self, *, image_size: tuple[int, int], in_chans: int, bandwidths: Iterable[tuple[int, int]]
    ) -> None:
        """Check that the network can be trained at full resolution and at every bandwidth of a run.

        Raises:
            UserError: if it cannot run at one of them, or its draws in training cannot be keyed.
        """
        from etpp_ssl.model.timm_net import check_sizes

        architecture, args = self.timm_args(image_size, in_chans, num_classes=2)
        check_sizes(architecture, args, image_size=image_size, in_chans=in_chans, bandwidths=bandwidths)

    def build(self, *, image_size: tuple[int, int], in_chans: int, num_classes: int, seed: int) -> Classifier:
        """The classifier, freshly initialised by timm from torch's global generator.

        Args:
            image_size: (H, W) at full resolution.
            in_chans: C.
            num_classes: of the data; the config's own takes its place.
            seed: the run's seed, for the drop-path draws alone.

        Raises:
            UserError: as `timm_args` and, for the full resolution, `check`.
        """
        from etpp_ssl.model.class_tokens import pool_class_tokens
        from etpp_ssl.model.timm_net import build_net, meta_net, use_attention

        self.check(image_size=image_size, in_chans=in_chans, bandwidths=())
        built_by = self.timm_args(image_size, in_chans, num_classes)
        net = build_net(*built_by)
        pool_class_tokens(net, self.class_tokens)
        use_attention(net, self.attention)
        if self.head_init_std is not None:
            self._init_head(net, self.head_init_std)
        if self.grad_checkpointing:
            try:
                net.set_grad_checkpointing(True)  # type: ignore[operator]
            except (AttributeError, AssertionError) as error:
                raise UserError(
                    f"model.grad_checkpointing is true, but {self.name} cannot recompute its blocks"
                ) from error
        if self.train != "all":
            freeze(net, self.train, self.name)
        if self.train == "lora":
            layers = self._layers_to_adapt(net)
            images = torch.empty(1, in_chans, *image_size, device="meta")
            check_called(meta_net(*built_by), layers, images, self.name)
            add_adapters(layers, rank=self.lora_rank, alpha=self.lora_alpha, seed=seed)
        return Classifier(
            net, seed=seed, grad_checkpointing=self.grad_checkpointing, in_parts=self.train != "all"
        )

    def _layers_to_adapt(self, net: nn.Module) -> dict[str, nn.Linear]:
        found = layers_to_adapt(net, self.lora_layers, heads_of(net))
        if found:
            return found
        others = layers_to_adapt(net, "all", heads_of(net))
        if others:
            raise UserError(
                f"model.train is lora, but {self.name} has no linear layers of attention; "
                f"model.lora_layers=all takes its {len(others)} others"
            )
        raise UserError(
            f"model.train is lora, but {self.name} has no linear layer beside its head: norms, last_N and "
            f"head can train it"
        )

    def _dims(self, image_size: tuple[int, int], in_chans: int) -> tuple[str, dict[str, Any]]:
        """The architecture, and the arguments of a ViT's dimensions."""
        from etpp_ssl.model.class_tokens import with_class_tokens
        from etpp_ssl.model.timm_net import dimension_names, is_vit, named_net

        given = self.given_dims()
        patch = given.get("patch_size")
        vit = self.name == EXPLICIT_NAME or is_vit(self.name)
        misplaced = [key for key in VIT_DIMS if vit and key in self.args]
        if misplaced:
            raise UserError(
                f"model.args.{misplaced[0]} of a Vision Transformer is the key model.{misplaced[0]}"
            )
        if self.name == EXPLICIT_NAME:
            dims = {key: value for key, value in given.items() if key != "patch_size"}
            architecture, args = encoder_args(
                name=self.name, image_size=image_size, patch_size=patch, in_chans=in_chans, dims=dims
            )
            # An encoder for pre-training keeps its final norm in front of the pooling.
            del args["fc_norm"]
            return architecture, args
        if given and not vit:
            key = next(iter(given))
            raise UserError(
                f"model.{key} is for Vision Transformers, and {self.name} is not one: arguments of other "
                "networks stand in model.args"
            )
        if patch is not None:
            given["patch_size"] = patch[0] if patch[0] == patch[1] else list(patch)
            if any(size % p for size, p in zip(image_size, patch, strict=True)):
                raise UserError(
                    f"model.patch_size {show_size(patch)} does not divide image_size {show_size(image_size)}"
                )
        if "class_tokens" in given:
            given = with_class_tokens(given, named_net(self.name), self.name)
        return self.name, {dimension_names(self.name).get(key, key): value for key, value in given.items()}

    def _init_head(self, net: nn.Module, std: float) -> None:
        from timm.layers import trunc_normal_

        head = net.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"model.head_init_std is {std}, but the head of {self.name} is not a linear layer"
            )
        trunc_normal_(head.weight, std=std)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def _beyond(value: Any, largest: int) -> bool:
    """Whether a recipe's value holds a larger number, with which no network could be built."""
    if isinstance(value, dict | list | tuple):
        values = value.values() if isinstance(value, dict) else value
        return len(value) > largest or any(_beyond(inner, largest) for inner in values)
    return isinstance(value, int | float) and not abs(value) <= largest


class Classifier(nn.Module):
    """A timm network whose drop-path is keyed by sample, at any bandwidth.

    `net` has stock timm's state dict, at base shapes, and where the config asks for them the adapters of
    `etpp_ssl.model.lora`. In evaluation at base size it equals stock timm to the last bit, but for adapters
    that have learned.

    Results depend on the samples, not on their batches, with one exception: BatchNorm in training takes the
    statistics of the micro-batch on its process (they are not synchronised), so networks that have it depend
    on the micro-batch size and on the number of processes.

    Args:
        net: from `etpp_ssl.model.timm_net.build_net`.
        seed: the run's seed, for the drop-path draws.
        grad_checkpointing: the network recomputes its blocks.
        in_parts: what is frozen in `net` stays in evaluation mode.
    """

    def __init__(
        self, net: nn.Module, *, seed: int, grad_checkpointing: bool = False, in_parts: bool = False
    ) -> None:
        from etpp_ssl.model.timm_net import key_drop_path

        super().__init__()
        self.net = net
        self.drop_path_keys = key_drop_path(net, seed)
        self.grad_checkpointing = grad_checkpointing
        self.in_parts = in_parts

    def train(self, mode: bool = True) -> Classifier:
        """As torch's; what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode and self.in_parts:
            frozen_to_eval(self.net)
        return self

    @property
    def encoder(self) -> nn.Module:
        """The network, for what takes an encoder: its head reads the features that a probe reads."""
        return self.net

    @property
    def transformer_blocks(self) -> list[nn.Module]:
        """A Vision Transformer's blocks, nearly all of its parameters; none of other networks."""
        encoder = transformer_of(self.net)
        return [] if encoder is None else list(encoder.net.blocks)

    def forward(self, images_BCHW: Tensor, sample_ids_B: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            images_BCHW: float (B, C, H, W), H and W multiples of the network's stride.
            sample_ids_B: int64 (B,), the samples' numbers in the run; needed in training with drop-path.

        Returns:
            (B, num_classes).

        Raises:
            UserError: in training with drop-path, without sample numbers.
        """
        keys = self.drop_path_keys
        if sample_ids_B is not None:
            sample_ids_B = sample_ids_B.to(images_BCHW.device)
        keys.set_sample_ids(sample_ids_B)
        logits: Tensor = self.net(images_BCHW)
        if self.grad_checkpointing:
            keys.keep_for_backward(logits, sample_ids_B)
        return logits
