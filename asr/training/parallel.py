"""How a model is spread over the processes of a run: PyTorch's DistributedDataParallel, ZeroRedundancyOptimizer and
fully_shard (FSDP2), chosen by one configuration; and what each process has of its state, for checkpoints.

ZeRO's stages (Rajbhandari et al. 2020) share out, in turn, optimizer state, gradients and weights. All engines average
gradients over processes; the trainer's loss is divided by the count over all of them, and multiplied by their number.
Shares of gradients are brought together after each batch of a step, whole gradients after its last.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from asr import checkpoint_folder
from asr.models.transducer import Transducer
from asr.training.offload import map_moments
from asr.training.optim import OptimConfig, make_optimizer, optimizer_kind, parameter_groups
from asr.training.ranks import Ranks
from asr.training.shares import is_share, own_part
from asr.training.trainer_config import ParallelConfig


class Parallel:
    """The model of one run on this process, and its optimizer.

    Args:
        model: on its device, with the weights that it begins with, the same on all processes. With zero 2 and 3 its
            weights become shares in place.
        config: how to spread it.
        optim: settings of the optimizer.
        ranks: the processes, which can talk to each other.
        unused: whether weights may be left out of a step.
        offload: "cpu" keeps shares in CPU memory, "file" the optimizer's moments in a file.
        file: of this process alone, for that.

    ``forward`` is what is called in place of the model.
    """

    def __init__(
        self,
        model: Transducer,
        config: ParallelConfig,
        optim: OptimConfig,
        ranks: Ranks,
        unused: bool = False,
        offload: str = "none",
        file: Path | None = None,
    ):
        config.check(ranks.size, offload)
        self.ranks, self.config = ranks, config
        self.model = model
        self.forward: nn.Module = model
        self.optimizer: torch.optim.Optimizer
        self.sharded = ranks.size > 1 and config.zero >= 2
        if self.sharded:
            self._shard(model, offload)
        elif ranks.size > 1:
            # of weights with one input channel, whose strides say the same in two ways
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # of a name that older versions do not know
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            # no messages in the forward pass (buffers never change): one process may fail in it, and all begin again
            self.forward = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
            )
        if ranks.size > 1 and config.zero == 1:
            from torch.distributed.optim import ZeroRedundancyOptimizer

            kind, arguments = optimizer_kind(optim)
            self.optimizer = ZeroRedundancyOptimizer(parameter_groups(model, optim), kind, **arguments)
        else:
            self.optimizer = make_optimizer(model, optim)
        self._mapped = map_moments(self.optimizer, file) if offload == "file" and file is not None else {}

    def _shard(self, model: Transducer, offload: str) -> None:
        """Each encoder block, the predictor, the joiner and what is left are gathered on their own, when they run."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        kind = next(model.parameters()).device.type
        mesh = _mesh(kind, self.ranks.size, self.config.replicas)
        gather_again = self.config.zero == 3
        # pinned memory is for copies to a device
        offloaded = CPUOffloadPolicy(pin_memory=kind == "cuda") if offload == "cpu" else OffloadPolicy()
        for unit in (*model.encoder.blocks, model.predictor, model.joiner, model):
            # elsewhere, rounded biases move the loss of all cells at once; and what enters a module stays as it is,
            # since log-mel energies lose too much, and products are under autocast anyway
            sent = torch.bfloat16 if self.config.gather == "bf16" and unit in model.encoder.blocks else None
            policy = MixedPrecisionPolicy(sent, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(unit, mesh=mesh, reshard_after_forward=gather_again, mp_policy=policy, offload_policy=offloaded)

    def no_sync(self) -> contextlib.AbstractContextManager[object]:
        """Within, whole gradients are added up without a word to other processes; shares always are brought together,
        since whole ones would take the memory that was to be saved."""
        return self.forward.no_sync() if isinstance(self.forward, DistributedDataParallel) else contextlib.nullcontext()

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        if gradients := self._gradients():  # none where all batches were skipped
            torch._foreach_mul_(gradients, factor)

    def _gradients(self) -> list[Tensor]:
        """This process's part of each gradient."""
        return [own_part(p.grad) for p in self.model.parameters() if p.grad is not None]

    def clip_grad_norm(self, most: float) -> float:
        """Scale gradients down to this global norm; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        return float(norm.full_tensor() if is_share(norm) else norm)

    def weights(self) -> dict[str, Tensor]:
        """The model's state, whole, on every process; all of them must call it."""
        return whole(self.model.state_dict())

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """Of all parameters, or of those whose optimizer state this process has."""
        own: torch.optim.Optimizer = getattr(self.optimizer, "optim", self.optimizer)  # ZeroRedundancyOptimizer has one
        return own

    def _names(self) -> dict[nn.Parameter, str]:
        return {value: name for name, value in self.model.state_dict(keep_vars=True).items()}

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """What this process has of the optimizer's state, by name of the parameter; no copies."""
        state = self._own_optimizer().state
        return {name: dict(state[p]) for p, name in self._names().items() if p in state}

    def new_optimizer_state(self, like: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Gives the optimizer new state without numbers; what this process has of it, as `optimizer_state`.

        Args:
            like: shapes and types, by name of the parameter; state of the parameter's own shape is shared out as it is.
        """
        own, names = self._own_optimizer(), self._names()
        own.state.clear()
        for parameter in (p for group in own.param_groups for p in group["params"]):
            if names[parameter] in like:
                entries = like[names[parameter]].items()
                mapped = self._mapped.get(parameter, {})
                own.state[parameter] = {
                    name: mapped[name] if name in mapped else _empty(value, parameter) for name, value in entries
                }
        return self.optimizer_state()


def _mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def whole(tree: Any) -> Any:
    """A tree of dicts and lists with the shares in it brought together; all processes must call it."""
    if is_share(tree):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {name: whole(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


def fill(tensors: dict[str, Tensor], path: Path, outlined: dict[str, Any]) -> None:
    """Copies the numbers of a checkpoint into whole tensors and shares, in place; of a folder, only theirs are read.

    Args:
        tensors: by their path in the checkpoint.
        path: of the checkpoint.
        outlined: what `checkpoint.outline` gave.

    Raises:
        CheckpointError: one of them is not there or cannot be read.
    """
    if path.is_dir():
        checkpoint_folder.fill(path, tensors)
        return
    _, whole = checkpoint_folder.split(outlined)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(_share(whole[name], tensor))


def _empty(like: Tensor, parameter: Tensor) -> Tensor:
    """Of the type and shape of ``like``, laid out as the parameter if that has the shape."""
    if like.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=like.dtype, requires_grad=False)
    return torch.empty(like.shape, dtype=like.dtype, device=parameter.device)


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, shared out as another is; nothing is sent."""
    if not is_share(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
