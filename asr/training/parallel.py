"""How a model is spread over the processes of a run: PyTorch's DistributedDataParallel, ZeroRedundancyOptimizer and
fully_shard (FSDP2), chosen by one configuration; and whole tensors of it for files, whatever the number of processes.

ZeRO's stages (Rajbhandari et al. 2020) share out, in turn, optimizer state, gradients and weights. All engines average
gradients over processes; the trainer's loss is divided by the count over all of them, and multiplied by their number.
Gradients are brought together after each batch, also of several in a step: a batch that is skipped then leaves nothing
behind on one process alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from asr.models.transducer import Transducer
from asr.training.optim import OptimConfig, adamw_arguments, make_optimizer, parameter_groups
from asr.training.ranks import Ranks
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
        offload: ``memory.offload``; "cpu" keeps shares in CPU memory.

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
            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=unused)
        if ranks.size > 1 and config.zero == 1:
            groups = parameter_groups(model, optim)
            self.optimizer = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw_arguments(optim))
        else:
            self.optimizer = make_optimizer(model, optim)

    def _shard(self, model: Transducer, offload: str) -> None:
        """Each encoder block, the predictor, the joiner and what is left are gathered on their own, when they run."""
        kind = next(model.parameters()).device.type
        mesh = _mesh(kind, self.ranks.size, self.config.replicas)
        gather_again = self.config.zero == 3
        # pinned memory is for copies to a device
        policy = CPUOffloadPolicy(pin_memory=kind == "cuda") if offload == "cpu" else OffloadPolicy()
        for unit in (*model.encoder.blocks, model.predictor, model.joiner, model):
            fully_shard(unit, mesh=mesh, reshard_after_forward=gather_again, offload_policy=policy)

    def clip_grad_norm(self, most: float) -> float:
        """Scale gradients down to this global norm; the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def weights(self) -> dict[str, Tensor]:
        """The model's state, whole, on every process; all of them must call it."""
        return whole(self.model.state_dict())

    def optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's state dict, whole, the same for any number of processes; all must call it. None where it is
        not known: it is on the first."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(to=0)
            return self.optimizer.state_dict() if self.ranks.first else None
        return whole(self.optimizer.state_dict())

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Whole tensors into the model."""
        self.model.load_state_dict(shared_like(weights, self.model.state_dict()))

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """A whole state dict into the optimizer."""
        if self.sharded:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            moments = {
                number: {name: _share(x, parameters[number]) for name, x in entry.items()}
                for number, entry in state["state"].items()
            }
            state = {**state, "state": moments}
        self.optimizer.load_state_dict(state)


def _mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def whole(tree: Any) -> Any:
    """A tree of dicts and lists with the shares in it brought together; all processes must call it."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {name: whole(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree


def shared_like(weights: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, each shared out as the one of its name is."""
    return {name: _share(value, like[name]) for name, value in weights.items()}


def _share(value: Any, like: Tensor) -> Any:
    """A whole tensor shared out as another of its shape; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    # every process has the whole tensor: nothing is sent
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
