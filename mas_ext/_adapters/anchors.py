"""θ* of adapted weights: which base they belong to, and the adapters when the last task ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mas_ext._adapters.lora import AdaptedWeight, Adapter

SAMPLED = 256  # elements of a weight in its fingerprint
TOLERANCE = 0.01  # of their norm: more than merging and unmerging an adapter in bfloat16 changes
_FINGERPRINT = "fingerprint"


@dataclass
class AdapterAnchors:
    """θ* = W + the product of ``adapters``, where W is the base, of which there is no copy.

    Attributes:
        adapters: weight's name → adapter's name → A, B and s. One whose B was 0 is left out.
        fingerprints: weight's name → some of its elements, by which another base is told apart.
    """

    adapters: dict[str, dict[str, Adapter]] = field(default_factory=dict)
    fingerprints: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, adapted: Mapping[str, AdaptedWeight]) -> AdapterAnchors:
        """The weights as they are now."""
        adapters = {
            name: {key: a.copied() for key, a in one.adapters().items() if a.b.any() and a.a.any()}
            for name, one in adapted.items()
        }
        fingerprints = {name: fingerprint(one) for name, one in adapted.items()}
        return cls({name: known for name, known in adapters.items() if known}, fingerprints)

    @classmethod
    @torch.no_grad()
    def room_for(cls, adapted: Mapping[str, AdaptedWeight]) -> AdapterAnchors:
        """The bases as they are now, and adapters that are 0, to load others into."""
        adapters = {
            name: {
                key: Adapter(torch.zeros_like(a), torch.zeros_like(b), scale)
                for key, (a, b, scale) in one.adapters().items()
            }
            for name, one in adapted.items()
        }
        return cls(adapters, {name: fingerprint(one) for name, one in adapted.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """A copy, as tensors by name."""
        state = {f"{name}/{_FINGERPRINT}": t.clone() for name, t in self.fingerprints.items()}
        for name, adapters in self.adapters.items():
            for key, (a, b, scale) in adapters.items():
                state[f"{name}/{key}/a"], state[f"{name}/{key}/b"] = a.clone(), b.clone()
                state[f"{name}/{key}/scale"] = torch.tensor(scale, dtype=torch.float64)
        return state

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], adapted: Mapping[str, AdaptedWeight]
    ) -> AdapterAnchors:
        """From what :meth:`state_dict` returned, for these weights; the rest is left out.

        Raises:
            ValueError: it is damaged, of another base, or of adapters that do not fit these layers.
        """
        anchors = cls({}, {name: fingerprint(one) for name, one in adapted.items()})
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, part = key.rpartition("/")
            if part != _FINGERPRINT:
                found.setdefault(name, {})[part] = value
            elif name in adapted and value.numel():
                check_base(name, anchors.fingerprints[name], value)
                anchors.fingerprints[name] = value.cpu()
        for name, parts in found.items():
            weight, _, adapter = name.rpartition("/")
            if weight in adapted:
                anchors._put(adapted[weight], adapter, parts)
        return anchors

    def _put(self, one: AdaptedWeight, adapter: str, parts: Mapping[str, Tensor]) -> None:
        if parts.keys() != {"a", "b", "scale"} or parts["scale"].numel() != 1:
            raise ValueError(
                f"the state is damaged: adapter {adapter!r} of {one.name!r} has {sorted(parts)}"
            )
        like = one.adapters().get(adapter)
        device = one.weight.device if like is None else like.a.device
        a, b = (parts[part].to(device, copy=True) for part in ("a", "b"))
        kept = Adapter(a, b, float(parts["scale"]))
        if not one.takes(kept):
            raise ValueError(
                f"the state has an adapter {adapter!r} of {one.name!r} whose A {list(a.shape)} and "
                f"B {list(b.shape)} do not fit it; load it beside the adapters that it was saved "
                "with"
            )
        if b.any():
            self.adapters.setdefault(one.name, {})[adapter] = kept


def names(state: Mapping[str, Tensor]) -> set[str]:
    """The weights that a state of :meth:`AdapterAnchors.state_dict` is of."""
    end = f"/{_FINGERPRINT}"
    return {key.removesuffix(end) for key in state if key.endswith(end)}


@torch.no_grad()
def fingerprint(one: AdaptedWeight) -> Tensor:
    """Elements of W, without what is merged into it; none if it is quantized."""
    if one.is_quantized:
        return torch.empty(0)
    if not one.layer.merged_adapters:
        return elements(one.weight)
    a, b = one.product(one.adapters().values())
    where = _sampled(one.weight).to(a.device)
    added = (b[where // a.shape[1]].float() * a[:, where % a.shape[1]].T.float()).sum(1)
    return elements(one.weight) - added.cpu()


def elements(weight: Tensor) -> Tensor:
    """Evenly spaced elements, float32 on the CPU."""
    return weight.detach().flatten()[_sampled(weight).to(weight.device)].float().cpu()


def _sampled(weight: Tensor) -> Tensor:
    last, count = weight.numel() - 1, min(weight.numel(), SAMPLED)
    return torch.linspace(0, last, count, dtype=torch.float64).long()


def check_base(name: str, found: Tensor, expected: Tensor) -> None:
    """Raises ValueError if elements differ from those of the base that Ω was measured with.

    Nothing is known of those of a quantized base.
    """
    if not (found.numel() and expected.numel()):
        return
    expected = expected.cpu().float()
    same = found.shape == expected.shape and bool(
        (found - expected).norm() <= TOLERANCE * expected.norm()
    )
    if not same:
        raise ValueError(
            f"the state was measured with another base model: {name!r} has other values; load "
            "the base that it belongs to. If an adapter was merged into the base since, start a "
            "new MAS, or measure again with consolidate()"
        )


def check_without_adapters(state: Mapping[str, Tensor], name: str, weight: Tensor) -> None:
    """Raises ValueError unless θ* of a weight is the weight itself: the base, unchanged."""
    if any(
        key.startswith(f"{name}/") and key.endswith("/b") and b.any() for key, b in state.items()
    ):
        raise ValueError(
            f"the state has adapters of {name!r} from a task that has ended, so θ* is not the "
            'base alone; load it into MAS(peft_model, adapters="merged")'
        )
    check_base(name, elements(weight), state[f"{name}/{_FINGERPRINT}"])
