"""The models that predictions are made for: those that are benchmarked, and two that need a GPU."""

from __future__ import annotations

from typing import NamedTuple


class Size(NamedTuple):
    title: str
    numels: list[int]

    @property
    def short(self) -> str:
        return self.title.split(" (")[0]


def _llama(layers: int, width: int, hidden: int, keys: int, vocabulary: int) -> list[int]:
    """``keys``: rows of the key and value projections. One table of words."""
    layer = [width * width, keys * width, keys * width, width * width, *[width * hidden] * 3]
    return [vocabulary * width, *[*layer, width, width] * layers, width]


LARGE = {
    "1b": Size("1 B (Llama 3.2 1B)", _llama(16, 2048, 8192, 512, 128256)),
    "7b": Size("7 B (Llama 2 7B)", [32000 * 4096, *_llama(32, 4096, 11008, 4096, 32000)]),
}


def sizes() -> dict[str, Size]:
    from benchmarks.lists.shapes import SIZES  # builds the models, without memory for them

    benchmarked = {
        name: Size(SIZES[name].title, [shape.numel() for shape in SIZES[name].shapes()])
        for name in ("resnet50", "gpt2")
    }
    return benchmarked | LARGE
