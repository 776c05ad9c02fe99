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


TARGET = 0.15
TRAININGS = {
    "plain": Training(ways=(UNIFORM, BY_MAS, BY_EWC)),
    "slow": Training(rate=0.3),
    "replay": Training(replay=0.05),
    "kl": Training(divergence=1.0),
    "l2sp": Training(regularizer="L2-SP", target=TARGET),
    "ewc": Training(regularizer="EWC", target=TARGET, ways=(BY_EWC,)),
    "mas": Training(regularizer="MAS", target=TARGET, ways=(BY_MAS,)),
    "lora": Training(lora=True, ways=(UNIFORM, BY_MAS)),
    "lora kl": Training(lora=True, divergence=1.0),
    "lora mas": Training(lora=True, regularizer="MAS", target=TARGET, ways=(BY_MAS,)),
}
QUICK = ("plain", "lora mas")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        training: the name of a training run.
        way: which of its curves: over the steps, or back towards the start.
        ours: whether it needs the importance of MAS.
    """

    training: str
    way: str = STEPS
    ours: bool = False


METHODS = {
    "fine-tuning, stopped early": Method("plain"),
    "a lower learning rate": Method("slow"),
    "5 % replay": Method("replay"),
    "KL to the base as a loss": Method("kl"),
    "L2-SP": Method("l2sp"),
    "EWC": Method("ewc"),
    "MAS": Method("mas", ours=True),
    "fine-tuning, interpolated": Method("plain", UNIFORM),
    "fine-tuning, settled with EWC": Method("plain", BY_EWC),
    "fine-tuning, settled with MAS": Method("plain", BY_MAS, ours=True),
    "5 % replay, interpolated": Method("replay", UNIFORM),
    "KL, interpolated": Method("kl", UNIFORM),
    "L2-SP, settled": Method("l2sp", UNIFORM),
    "EWC, settled": Method("ewc", BY_EWC),
    "MAS, settled": Method("mas", BY_MAS, ours=True),
    "LoRA, stopped early": Method("lora"),
    "LoRA, interpolated": Method("lora", UNIFORM),
    "LoRA, KL to the base as a loss": Method("lora kl"),
    "LoRA, KL, interpolated": Method("lora kl", UNIFORM),
    "LoRA, settled with MAS": Method("lora", BY_MAS, ours=True),
    "LoRA, MAS on the update": Method("lora mas", ours=True),
    "LoRA, MAS on the update, settled": Method("lora mas", BY_MAS, ours=True),
}
