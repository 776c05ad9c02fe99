"""``python -m benchmarks.predict.large``: MAS beside the training of models of 7 and 70 billion.

Arithmetic, no measurement: memory a rank, memory traffic a step, and what measuring Ω takes. Writes
the tables of ``docs/large_models.md``; ``tests/test_predictions.py`` holds the page to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.predict.gpus import GIGA, GPUS
from benchmarks.predict.model import FAST, LIKELY, SLOW, duration
from benchmarks.show.readme import filled
from benchmarks.show.table import Table
from mas_ext.reference import BLOCK

PAGE = Path(__file__).parents[2] / "docs" / "large_models.md"
GPU = GPUS["h100"]
POSITIONS = 2048  # of a sample
SAMPLES = 1024  # that a task's Ω is measured on
TOKENS = 8192  # a rank and training step

# What a program reaches; (likely, at best, at worst).
OF_PEAK = (0.40, 0.50, 0.30)  # of the tensor cores' peak, by forward and backward passes
NETWORK = (40 * GIGA, 45 * GIGA, 25 * GIGA)  # bytes a second that a rank receives, 8 nodes or more
NVLINK = (300 * GIGA, 380 * GIGA, 200 * GIGA)  # the same within a node of 8


@dataclass(frozen=True)
class Model:
    """A decoder of the Llama 2 family, and the GPUs it is trained on."""

    name: str
    width: int
    layers: int
    hidden: int
    kv: int  # width of keys and of values
    vocabulary: int
    ranks: int

    @property
    def multiplied(self) -> int:
        """Parameters that matrix products use: attention, three of the other layer, the head."""
        attention = 2 * self.width + 2 * self.kv
        return self.width * (self.layers * (attention + 3 * self.hidden) + self.vocabulary)

    @property
    def parameters(self) -> int:
        embedding, norms = self.vocabulary * self.width, (2 * self.layers + 1) * self.width
        return self.multiplied + embedding + norms

    @property
    def network(self) -> tuple[float, float, float]:
        return NVLINK if self.ranks <= 8 else NETWORK


@dataclass(frozen=True)
class Recipe:
    """Bytes a parameter of a kind of training: θ, g, and Adam's two moments."""

    name: str
    theta: int
    grad: int
    moments: int

    @property
    def training(self) -> int:
        return self.theta + self.grad + 2 * self.moments

    def state(self, omega: float) -> float:
        """θ* is as wide as θ."""
        return self.theta + omega


MODELS = (
    Model("7 B", 4096, 32, 11008, 4096, 32000, ranks=8),
    Model("70 B", 8192, 80, 28672, 1024, 32000, ranks=64),
)
RECIPES = (Recipe("float32 θ, bfloat16 passes", 4, 4, 4), Recipe("all bfloat16", 2, 2, 2))
OMEGA = {"float32": 4.0, "bfloat16": 2.0, "uint8": 1 + 4 / BLOCK}


def gigabytes(size: float) -> str:
    return f"{size / GIGA:.1f}"


# -- memory ----------------------------------------------------------------------------------------
def memory() -> Table:
    return Table(
        "Predicted: gigabytes a rank, everything sharded (fully_shard)",
        ("model, GPUs", "training", "θ, g, Adam", *(f"+ MAS, Ω in {name}" for name in OMEGA)),
        [
            [
                f"{model.name} ({model.parameters / 1e9:.2f}), {model.ranks}",
                recipe.name,
                gigabytes(recipe.training * model.parameters / model.ranks),
                *(
                    f"{gigabytes(recipe.state(omega) * model.parameters / model.ranks)} "
                    f"({recipe.state(omega):.2f} B)"
                    for omega in OMEGA.values()
                ),
            ]
            for model in MODELS
            for recipe in RECIPES
        ],
        frozenset(),
    )


# -- a step ----------------------------------------------------------------------------------------
def attached_bytes(recipe: Recipe, omega: float) -> float:
    """mas.attach: reads g, θ, θ*, Ω and writes g."""
    return 2 * recipe.grad + 2 * recipe.theta + omega


def fused_bytes(recipe: Recipe, omega: float) -> float:
    """mas_ext.optim: reads θ* and Ω beside what the step reads anyway."""
    return recipe.theta + omega


def seconds_of_step(model: Model, number: int = 0) -> float:
    """Forward and backward: six FLOP a parameter and token."""
    rate = OF_PEAK[number] * GPU.tensor_bf16
    return 6 * model.multiplied * TOKENS / rate


def traffic() -> Table:
    rate = LIKELY.of_bandwidth * GPU.bandwidth
    rows = []
    for model in MODELS:
        for recipe in RECIPES:
            share = model.parameters / model.ranks
            cells = []
            for count in (attached_bytes, fused_bytes):
                size = count(recipe, OMEGA["uint8"]) * share
                part = size / rate / seconds_of_step(model)
                cells += [f"{gigabytes(size)} GB, {duration(size / rate)}", f"{100 * part:.2f} %"]
            step = duration(seconds_of_step(model))
            rows.append([f"{model.name}, {model.ranks}", recipe.name, step, *cells])
    return Table(
        f"Predicted: what MAS adds to a step of {TOKENS:,} tokens a rank on an H100, Ω in uint8: "
        "memory traffic and its time, and the share of the passes",
        ("model, GPUs", "training", "passes", "attach", "", "mas_ext.optim", ""),
        rows,
        frozenset(),
    )


# -- measuring -------------------------------------------------------------------------------------
def seconds_of_passes(model: Model, number: int = 0) -> float:
    """A sample forward and backward. A batch of one: with thousands of positions it fills a GPU."""
    return 6 * model.multiplied * POSITIONS / (OF_PEAK[number] * GPU.tensor_bf16)


def seconds_of_sample(model: Model, number: int = 0) -> float:
    """The passes, and Ω += |g| of a bfloat16 gradient: 10 bytes a parameter."""
    rate = (LIKELY, FAST, SLOW)[number].of_bandwidth * GPU.bandwidth
    return seconds_of_passes(model, number) + 10 * model.parameters / rate


def whole_bytes(model: Model) -> float:
    """The model in bfloat16, and Ω's float32 sums, whole on every rank."""
    return (2 + 4) * model.parameters


def seconds_sharded(model: Model, number: int = 0) -> float:
    """Everything stays sharded, a sample a rank and pass: ordinary passes, or what they wait for.

    All parameters are gathered twice in bfloat16, and the magnitudes scattered in float32.
    """
    received = (2 + 2 + 4) * model.parameters * (model.ranks - 1) / model.ranks
    return max(seconds_of_passes(model, number), received / model.network[number])


def interval(values: tuple[float, float, float]) -> str:
    likely, low, high = map(duration, values)
    return f"{likely} ({low} to {high})"


def measuring() -> Table:
    rows = []
    for model in MODELS:
        share = SAMPLES / model.ranks
        one_pass = tuple(share * seconds_of_sample(model, i) for i in range(3))
        sharded = tuple(share * seconds_sharded(model, i) for i in range(3))
        fits = whole_bytes(model) < GPU.memory
        rows.append(
            [
                f"{model.name}, {model.ranks}",
                f"{gigabytes(whole_bytes(model))}",
                interval(one_pass) if fits else "does not fit",
                f"{gigabytes(4 * model.parameters / model.ranks)}",
                interval(sharded),
            ]
        )
    return Table(
        f"Predicted: measuring Ω of {SAMPLES:,} samples of {POSITIONS:,} tokens, exact, on H100s",
        (
            "model, GPUs",
            "whole on every rank, GB",
            "a rank by itself",
            "sharded sums, GB",
            "a sample a rank, all sharded",
        ),
        rows,
        frozenset(),
    )


TABLES = {"memory": memory, "traffic": traffic, "measuring": measuring}


def _block(table: Table) -> str:
    return f"{table.title}\n\n{table.markdown()}"


def rewritten(text: str) -> str:
    """The page with its tables written anew."""
    return filled(text, {name: partial(_block, make()) for name, make in TABLES.items()})


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text("utf-8")), "utf-8")
