"""What is learned, what is watched, and what may be kept of it: blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH = 96  # tokens per block
WATCHED = ("english", "code")
HELD_OUT = 0.2  # the part of a text, at its end, on which nothing is trained or measured


@dataclass(frozen=True)
class Texts:
    """Blocks of tokens, [N, LENGTH].

    Attributes:
        learned: of the new text.
        held_out: of the new text, ``"new"``, and of those that are watched, by name.
        old: of the watched texts, in equal parts: what replay trains on.
        kept: a few blocks of ``old``: the references of a drift budget, on which Ω is measured too,
            and the text of the KL divergence as a loss.
    """

    learned: Tensor
    held_out: dict[str, Tensor]
    old: Tensor
    kept: Tensor

    @classmethod
    def read(cls, folder: Path, new: str, tokenizer: Any, *, kept: int, tested: int) -> Texts:
        """Args: ``kept`` and ``tested``: how many blocks of each watched text, and of each text."""
        blocks = {n: _blocks(folder / f"{n}.txt", tokenizer) for n in (new, *WATCHED)}
        begins = {name: round(len(block) * (1 - HELD_OUT)) for name, block in blocks.items()}
        held_out = {n: _spread(block[begins[n] :], tested) for n, block in blocks.items()}
        old = [blocks[name][: begins[name]] for name in WATCHED]
        shortest = min(map(len, old))
        return cls(
            learned=blocks[new][: begins[new]],
            held_out={"new": held_out.pop(new), **held_out},
            old=torch.cat([block[:shortest] for block in old]),
            kept=torch.cat([_spread(block, kept) for block in old]),
        )


def _blocks(path: Path, tokenizer: Any) -> Tensor:
    tokens = torch.tensor(tokenizer(path.read_text(encoding="utf-8")).input_ids)
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def _spread(blocks: Tensor, count: int) -> Tensor:
    """``count`` of the blocks, at equal distances."""
    return blocks[torch.linspace(0, len(blocks) - 1, count).long()]
