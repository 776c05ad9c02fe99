"""The training runs, and the methods that are compared, each with the runs that show it."""

from __future__ import annotations

from dataclasses import dataclass

UNIFORM, BY_MAS, BY_EWC = "uniform", "MAS", "EWC"  # the weights on the way back to θ*
STEPS = "steps"  # a curve over the steps of training


@dataclass(frozen=True)
class Training:
    """How the new text is learned.

    Attributes:
        rate: the learning rate, relative to the one that suits plain training.
        regularizer: its penalty acts in training; None: no penalty.
        target: where λ steers the drift on the kept text, in nats per prediction.
        lora: whether adapters are trained, and the penalty is on the weights' update; otherwise
            all weights.
        replay: the share of the samples that are from the old text.
        divergence: the weight of KL(before ‖ now) on the kept text in the loss.
        ways: the weights with which the result is moved back towards the start.
    """

    rate: float = 1.0
    regularizer: str | None = None
    target: float = 0.0
    lora: bool = False
    replay: float = 0.0
    divergence: float = 0.0
    ways: tuple[str, ...] = (UNIFORM,)


def _held(target: float) -> dict[str, Training]:
    """With a penalty in training."""
    return {
        f"mas {target}": Training(regularizer="MAS", target=target, ways=(BY_MAS,)),
        f"merged {target}": Training(regularizer="MAS", target=target, ways=(BY_MAS,), lora=True),
        f"ewc {target}": Training(regularizer="EWC", target=target, ways=(BY_EWC,)),
        f"l2sp {target}": Training(regularizer="L2-SP", target=target),
    }


TRAININGS = {
    "plain": Training(ways=(UNIFORM, BY_MAS, BY_EWC)),
    "lora": Training(lora=True, ways=(UNIFORM, BY_MAS)),
    "replay": Training(replay=0.05),
    "kl 1": Training(divergence=1.0),
    "slow": Training(rate=0.3),
    **_held(0.15),
    "lora kl 1": Training(divergence=1.0, lora=True),
    "kl 4": Training(divergence=4.0),
    **_held(0.05),
    "slower": Training(rate=0.1),
}
QUICK = ("plain", "merged 0.15")


@dataclass(frozen=True)
class Method:
    """A row of the table: the best of some curves.

    Attributes:
        trainings: names of training runs.
        way: which of their curves: over the steps, or back towards the start.
        ours: whether it is one that mas_ext is for.
    """

    trainings: tuple[str, ...]
    way: str = STEPS
    ours: bool = False


def _every(prefix: str) -> tuple[str, ...]:
    return tuple(name for name in TRAININGS if name.startswith(prefix))


METHODS = {
    "fine-tuning, stopped early": Method(("plain",)),
    "a lower learning rate": Method(("slow", "slower")),
    "5 % replay": Method(("replay",)),
    "KL to the base as a loss": Method(_every("kl")),
    "L2-SP": Method(_every("l2sp")),
    "EWC": Method(_every("ewc")),
    "MAS": Method(_every("mas"), ours=True),
    "fine-tuning, interpolated": Method(("plain",), UNIFORM, ours=True),
    "fine-tuning, settled with EWC": Method(("plain",), BY_EWC),
    "fine-tuning, settled with MAS": Method(("plain",), BY_MAS, ours=True),
    "5 % replay, interpolated": Method(("replay",), UNIFORM),
    "KL, interpolated": Method(_every("kl"), UNIFORM),
    "L2-SP, settled": Method(_every("l2sp"), UNIFORM),
    "EWC, settled": Method(_every("ewc"), BY_EWC),
    "MAS, settled": Method(_every("mas"), BY_MAS, ours=True),
    "LoRA, stopped early": Method(("lora",)),
    "LoRA, interpolated": Method(("lora",), UNIFORM, ours=True),
    "LoRA, KL to the base as a loss": Method(("lora kl 1",)),
    "LoRA, KL, interpolated": Method(("lora kl 1",), UNIFORM),
    "LoRA, settled with MAS": Method(("lora",), BY_MAS, ours=True),
    "LoRA, MAS on the update": Method(_every("merged"), ours=True),
    "LoRA, MAS on the update, settled": Method(_every("merged"), BY_MAS, ours=True),
}
