"""The ranks of tensor parallelism: which heads are this one's, and words between them at start-up."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.distributed import get_tp_group, model_parallel_is_initialized

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the model's heads.

    Every method is a call that all ranks have to make, in the same order.

    Parameters
    ----------
    number, mine : int
        How many there are, and which one this is.
    """

    number: int = 1
    mine: int = 0

    @classmethod
    def of_engine(cls) -> "Ranks":
        """Of the engine that this process works for; one alone where there is none."""
        if not model_parallel_is_initialized():
            return cls()
        group = get_tp_group()
        return cls(group.world_size, group.rank_in_group)

    @property
    def first(self) -> bool:
        """Whether this is the one that reads, writes and speaks for all."""
        return self.mine == 0

    def agree(self, value: T) -> T:
        """The first rank's value, which must pickle."""
        if self.number == 1:
            return value
        box: list[Any] = [value]
        group = get_tp_group()
        torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
        return box[0]

    def agree_on(self, tensor: Tensor) -> Tensor:
        """The first rank's numbers, in place."""
        return tensor if self.number == 1 else get_tp_group().broadcast(tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """``[...]`` on the CPU -> ``[ranks, ...]``, the same everywhere."""
        if self.number == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.number)]
        torch.distributed.all_gather(found, tensor.contiguous(), group=get_tp_group().cpu_group)
        return torch.stack(found)
