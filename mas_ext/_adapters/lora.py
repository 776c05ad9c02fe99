r"""What PEFT's LoRA layers add to the weights that they adapt.

A layer with the frozen weight W and active adapters k computes with :math:`W + \sum_k s_k B_k A_k`.
Everything else works with the sum as one product B·A, whose factors have the layout of W: PEFT
keeps some weights transposed, and those of convolutions in more dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from mas_ext._distributed.shards import is_sharded
from mas_ext._parameters import ParameterIndex, modules_by_prefix

_MODEL = "base_model.model."  # of a PeftModel's names
_LAYER = ".base_layer."  # of the weights inside an adapted layer
_REMEDY = 'use adapters="separate", or leave the layer out of target_modules'


class Adapter(NamedTuple):
    """One adapter of a layer: A and B as PEFT has them, and s."""

    a: Tensor
    b: Tensor
    scale: float

    def copied(self) -> Adapter:
        """With A and B as they are now."""
        return Adapter(self.a.detach().clone(), self.b.detach().clone(), self.scale)


class AdaptedWeight:
    """A weight, and the LoRA layer that adapts it.

    Args:
        name: the weight's name in the model without adapters.
        layer: a ``LoraLayer``.

    Attributes:
        weight: W; if it is quantized, a stand-in of its shape without memory.
        is_quantized: whether it is.

    Raises:
        ValueError: the layer's adapters add something else than B·A.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name = name
        self.layer = layer
        weight = _weight(layer, name)
        self.is_quantized = not weight.is_floating_point() or type(weight.data) is not Tensor
        if self.is_quantized:
            shape = (layer.out_features, layer.in_features)
            weight = Parameter(torch.empty(1, device=weight.device).expand(shape), False)
        self.weight: Any = weight
        self._embeds = isinstance(layer.get_base_layer(), nn.Embedding)
        for adapter in self._named():
            _check_plain(layer, adapter, name)

    def adapters(self) -> dict[str, Adapter]:
        """The adapters that take part in the forward pass now, by name."""
        layer = self.layer
        taking_part = layer.merged_adapters or ([] if layer.disable_adapters else None)
        active = layer.active_adapters if taking_part is None else taking_part
        return {
            name: Adapter(*self._factors(name), float(layer.scaling[name]))
            for name in self._named()
            if name in active
        }

    def params(self) -> list[Tensor]:
        """A and B of these adapters, as far as they are trained."""
        factors = (factor for one in self.adapters().values() for factor in (one.a, one.b))
        return [factor for factor in factors if factor.requires_grad]

    def product(self, adapters: Iterable[Adapter]) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], whose product is the adapters' update of W, differentiable.

        Where W has more than two dimensions, ``in`` is all but the first.
        """
        laid_out = [self._laid_out(one) for one in adapters]
        return torch.cat([a for a, _ in laid_out]), torch.cat([b for _, b in laid_out], 1)

    def takes(self, one: Adapter) -> bool:
        """Whether an adapter's factors have shapes whose product is an update of W."""
        if min(one.a.dim(), one.b.dim()) < 2:
            return False
        a, b = self._laid_out(one)
        rows, columns = self.weight.shape[0], self.weight.shape[1:].numel()
        return (len(b), a.shape[1]) == (rows, columns) and b.shape[1] == len(a)

    def _laid_out(self, one: Adapter) -> tuple[Tensor, Tensor]:
        a, b = one.a.flatten(1), one.b.flatten(1) * one.scale
        transposed = self._embeds or getattr(self.layer, "fan_in_fan_out", False)
        return (b.T, a.T) if transposed else (a, b)

    def _named(self) -> list[str]:
        layer = self.layer
        return list(layer.lora_embedding_A if self._embeds else layer.lora_A)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        if self._embeds:
            return self.layer.lora_embedding_A[name], self.layer.lora_embedding_B[name]
        return self.layer.lora_A[name].weight, self.layer.lora_B[name].weight


def _weight(layer: Any, name: str) -> Tensor:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f'adapters="merged": the layer of {name!r}, a {type(layer.get_base_layer()).__name__}, '
            f"has no weight that its adapter updates; {_REMEDY}"
        )
    if is_sharded(weight):
        raise ValueError(
            f'adapters="merged": {name!r} is sharded, which is not supported; use '
            'adapters="separate"'
        )
    return weight


def _check_plain(layer: Any, adapter: str, name: str) -> None:
    """Raises ValueError unless an adapter adds s·B·A to the weight, and nothing else."""
    base = layer.get_base_layer()
    kind = None
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__  # DoRA, for example
    elif adapter in layer.lora_B and getattr(layer.lora_B[adapter], "bias", None) is not None:
        kind = "lora_bias=True"
    elif getattr(base, "groups", 1) > 1:
        kind = "a grouped convolution"
    elif isinstance(base, nn.MultiheadAttention):
        kind = "MultiheadAttention"
    if kind is not None:
        raise ValueError(
            f'adapters="merged": the update of {name!r} is not one product of two matrices '
            f"({kind}, adapter {adapter!r}); {_REMEDY}"
        )


class MergedIndex(ParameterIndex):
    """The parameters of the model without its adapters, and what adapts them.

    Names are those of the model before PEFT wrapped it, so that what was measured on the one is
    known to the other. A and B are not among them.

    Attributes:
        adapted: the weights that have a LoRA layer, by name.
    """

    def _look_up(self) -> None:
        super()._look_up()
        layer_type = _lora_layer()
        factors: set[int] = set()
        adapted: dict[str, AdaptedWeight] = {}
        for prefix, module in modules_by_prefix(self.model):
            if isinstance(module, layer_type):
                factors |= _factor_ids(module)
                name = _name_without_adapters(f"{prefix}base_layer.weight")
                adapted[name] = AdaptedWeight(name, module)
        _check_distinct(adapted)
        named = {
            _name_without_adapters(name): p
            for name, p in self._named.items()
            if id(p) not in factors
        }
        self._named = {n: adapted[n].weight if n in adapted else p for n, p in named.items()}
        self._adapted = adapted

    @property
    def adapted(self) -> Mapping[str, AdaptedWeight]:
        self.named()  # which looks again if the model has changed
        return self._adapted

    @contextmanager
    def measurable(self) -> Iterator[None]:
        """Lets gradients reach the frozen weights.

        Raises:
            ValueError: one is quantized, or is trained beside its adapter.
        """
        for one in self.adapted.values():
            if one.is_quantized:
                raise ValueError(
                    f"the importance of {one.name!r} cannot be measured, since it is quantized "
                    "and has no gradient; measure it on the model before it is quantized, with "
                    "the same adapters, save() it and load() it here"
                )
            if one.weight.requires_grad:
                raise ValueError(
                    f"{one.name!r} is trained beside its adapter, and its update is then not "
                    'that of the adapter alone; freeze it, or use adapters="separate"'
                )
        weights = [one.weight for one in self.adapted.values()]
        try:
            for weight in weights:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)


def _lora_layer() -> type:
    """PEFT's base class; a class of nothing if PEFT was never imported."""
    module = sys.modules.get("peft.tuners.lora")
    return getattr(module, "LoraLayer", type("LoraLayer", (), {}))


def _name_without_adapters(name: str) -> str:
    return name.removeprefix(_MODEL).replace(_LAYER, ".").removeprefix(_LAYER[1:])


def _factor_ids(layer: Any) -> set[int]:
    """The ids of A and B of all adapters of a layer, active or not."""
    holders = (getattr(layer, name, None) for name in layer.adapter_layer_names)
    return {
        id(p)
        for holder in holders
        if holder is not None
        for p in (holder.values() if isinstance(holder, nn.ParameterDict) else holder.parameters())
    }


def _check_distinct(adapted: Mapping[str, AdaptedWeight]) -> None:
    """Raises ValueError if a weight is used by two layers: Ω is that of both together."""
    seen: dict[int, str] = {}
    for name, one in adapted.items():
        before = seen.setdefault(id(one.weight), name)
        if before != name:
            raise ValueError(
                f'adapters="merged": {before!r} and {name!r} are one weight with two adapters; '
                f"{_REMEDY}"
            )
