"""Models whose tensors are spread over the processes by FSDP2: set up, gathered into whole tensors, and back.

Every process holds its part of each parameter, gradient and optimizer state, as a `DTensor`. Files hold
whole tensors, so that a checkpoint does not tell how many processes wrote it, or how: it is read by one
process, by DDP and by FSDP2 alike. Evaluation runs on whole copies, because the processes evaluate
different numbers of images and a sharded forward pass needs all of them at every block.

What gathers or distributes is a collective: every process must call it, for the same tensors. Tensors that
are whole already pass through untouched, so callers need not know whether a run is sharded.

`accelerate launch` hands its configuration file on as environment variables. The units are the model's
transformer blocks; all other parameters are the root unit's, which stays whole from the beginning of a
forward pass to the end of its backward pass, because models read some of them outside any module's forward
(tokens, position embeddings, the patch projection of visible patches).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from etpp_ssl.config import UserError
from etpp_ssl.curriculum.base import Stage
from etpp_ssl.data.sampler import micro_batch_of, process_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

M = TypeVar("M", bound=nn.Module)


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors of the processes' parts, gathered one after the other; a collective.

    Args:
        tensors: under the same names on every process.
        keep: whether this process wants them. One that does not takes part, and never holds more than one.

    Returns:
        Those that were in parts on the CPU, the others as they were; nothing without `keep`.
    """
    found = {}
    # The order of a state dict is the model's; that of an optimizer's is its own.
    for name in sorted(tensors):
        tensor = tensors[name]
        if _in_parts(tensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else tensor
        if keep:
            found[name] = tensor
    return found


def parted_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `own` is; a collective.

    Args:
        tensor: whole; the main process's is the one that counts.
        own: tells how. One that is whole itself, or of another shape, leaves the tensor whole.
    """
    if not _in_parts(own) or own.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements)


@torch.no_grad()
def own_parts(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of a model's `state_dict`; writing to it changes the model. No collective."""
    return {
        name: tensor.to_local() if _in_parts(tensor) else tensor
        for name, tensor in model.state_dict().items()
    }


class Copies:
    """Makes copies of a sharded model, which itself cannot be copied.

    Args:
        model: as it is before it is sharded; its parameters are not kept.
    """

    def __init__(self, model: nn.Module) -> None:
        # deepcopy takes what its memo has for an object, so no parameter is held twice.
        without_numbers: dict[int, object] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
            for parameter in model.parameters()
        }
        self._blank = copy.deepcopy(model, without_numbers)

    def whole(self, model: M) -> M:
        """A plain model in eval mode with all of the weights, on the device of `model`; a collective.

        It takes the memory of an unsharded model on each process, for as long as it is held.
        """
        device = next(model.parameters()).device
        # The blank model's other buffers are where the model was before it was sharded.
        return self._filled(_gathered(model)).to(device)  # type: ignore[return-value]

    def parts(self, model: nn.Module) -> nn.Module:
        """A copy that has its parts as `model` has, for what is done element by element; it cannot be run."""
        return self._filled({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

    def _filled(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        filled = copy.deepcopy(self._blank)
        filled.load_state_dict(tensors, assign=True)
        return filled.train(False)


def _gathered(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if _in_parts(tensor) else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


WRAP_POLICY = "TRANSFORMER_BASED_WRAP"
_REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing",
        "model.grad_checkpointing=true in the recipe recomputes the same blocks",
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading",
        "every process builds the model from the recipe's seed",
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "checkpoints are gathered from the GPUs"),
}


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin | None:
    """What the accelerate configuration says about FSDP, or None where it wants none.

    In bf16 the model computes with rounded copies of float32 weights, and gradients are summed over
    micro-batches and processes in float32; accelerate's own choice would be bf16 there, too.

    Args:
        precision: the recipe's.

    Raises:
        UserError: for a setting that does not go together with the runs of this package.
    """
    if not _set("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"fsdp_version is {version} in the accelerate configuration; it must be 2")
    for variable, (key, reason) in _REFUSED.items():
        if _set(variable):
            raise UserError(f"{key} is true in the accelerate configuration; it must be false: {reason}")
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy != WRAP_POLICY:
        raise UserError(
            f"fsdp_auto_wrap_policy is {policy} in the accelerate configuration; it must be {WRAP_POLICY}"
        )
    if precision == "fp16":
        raise UserError("precision fp16 does not go together with FSDP2; use bf16 or fp32")
    from torch.distributed.fsdp import MixedPrecisionPolicy

    halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=halved if precision == "bf16" else None)


_PLUGINS = {
    # Its `backward` takes the optimizer step, before a run has judged the gradients, and the optimizer's
    # state lies in buffers that no checkpoint of ours describes.
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed, which takes its optimizer steps out of the run's hands; use FSDP2 for the same division "
        "of memory (recipes/accelerate/fsdp2_8gpu.yaml)"
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM, which brings models of its own; use FSDP2 to divide this one's memory "
        "(recipes/accelerate/fsdp2_8gpu.yaml)"
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "use_parallelism_config, but each process takes a part of the batch of its own; leave it false"
    ),
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own processes; use torchrun or accelerate's MULTI_GPU",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend; leave it NO and set model.compiled=true in the recipe",
}


def refuse_plugins() -> None:
    """See that the accelerate configuration asks for nothing that a run of this package cannot do.

    Raises:
        UserError: if it does.
    """
    for variable, sentence in _PLUGINS.items():
        if os.environ.get(variable, "no").lower() not in ("no", "false", "0", "off", "n", "f", ""):
            raise UserError(f"accelerate was launched with {sentence}")


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer, Copies | None]:
    """Let accelerate prepare a run's model and optimizer, sharded or not.

    Args:
        accelerator: of the run.
        model: whole; sharded in place where the accelerate configuration says so.
        optimizer: of the model.

    Returns:
        The model to train, its optimizer, and what makes whole copies of a sharded model.

    Raises:
        UserError: if the model cannot be trained in parts.
    """
    if not accelerator.is_fsdp2:
        return *accelerator.prepare(model, optimizer), None
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = unit_names(
        model, accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    )
    copies = Copies(model)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    # Under DDP accelerate does it itself.
    prepared.forward = convert_outputs_to_fp32(prepared.forward)
    return prepared, prepared_optimizer, copies


def sharding_in_use(accelerator: Accelerator) -> str:
    """What a checkpoint remembers of it beside the kernels, because the last bits depend on it."""
    return ", FSDP2" if accelerator.is_fsdp2 else ""


def unit_names(model: nn.Module, asked: list[str] | None = None) -> list[str]:
    """Class names of the modules that become units of their own.

    Args:
        model: of a task; its `transformer_blocks` are the units.
        asked: names in the accelerate configuration, which need none.

    Raises:
        UserError: for a model without transformer blocks, or other names.
    """
    blocks: list[nn.Module] = model.transformer_blocks  # type: ignore[assignment]
    names = sorted({type(block).__name__ for block in blocks})
    if not names:
        raise UserError("FSDP2 serves Vision Transformers only; train this model with DDP (MULTI_GPU)")
    if asked is not None and sorted(asked) != names:
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap is {','.join(asked)} in the accelerate configuration; the "
            f"blocks of this model are {','.join(names)}: leave the key out"
        )
    return names


def check_sharded(
    stages: Sequence[Stage],
    *,
    micro_batch_size: int | None,
    batch_size: int,
    num_processes: int,
    compiled: bool,
    whole_matrices: bool,
) -> None:
    """See that all processes have as many micro-batches: each one's forward pass needs all the others.

    Args:
        stages: of the run.
        micro_batch_size, batch_size: of the recipe.
        num_processes: of the run.
        compiled: whether the blocks run through `torch.compile`.
        whole_matrices: whether the optimizer needs each weight matrix in one piece, as Muon does.

    Raises:
        UserError: if not, for blocks that are compiled, or for such an optimizer.
    """
    if compiled:
        raise UserError("model.compiled is true, which does not go together with FSDP2; leave it false")
    if whole_matrices:
        raise UserError(
            "optim.name is Muon's, which orthogonalises whole matrices, and FSDP2 gives each process a part "
            "of them: use DDP, or optim.name=adamw"
        )
    for stage in stages:
        size = micro_batch_of(stage.batch_size, micro_batch_size, batch_size)
        parts = [process_part(range(stage.batch_size), rank, num_processes) for rank in range(num_processes)]
        counts = {-(-len(part) // size) for part in parts}
        if len(counts) > 1:
            raise UserError(
                f"batch_size {stage.batch_size} (stage {stage.index + 1}) gives some of the {num_processes} "
                f"processes {min(counts)} micro-batches and others {max(counts)}; under FSDP2 all need the "
                f"same number; take a batch_size that is a multiple of {num_processes}"
            )


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _in_parts(tensor: Tensor) -> TypeGuard[DTensor]:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
