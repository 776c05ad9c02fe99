"""Looking on while a model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watching(TorchDispatchMode):
    """A mode that sees every operation, below autograd and autocast, and changes none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first of all modes loads torch._dynamo, which takes two seconds


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
