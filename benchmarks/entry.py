"""What the command knows of a benchmark, whatever it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.show.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]  # of one item: a size, a model, an axis; as JSON
Results = dict[str, Result]  # of a benchmark, by item
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        quick: a first look, on few and small items.
        rounds: at most; the benchmark's time may allow fewer.
        seconds: that the benchmark's rounds may take in all, without what has to be built.
        sizes, workloads: names; empty for all of them.
        seeds: of the demo.
        tell: shows what is being done.
    """

    quick: bool
    rounds: int
    seconds: float
    sizes: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    tell: Tell = lambda text: None


@dataclass(frozen=True)
class Entry:
    """A benchmark.

    Attributes:
        name: as on the command line.
        title: as on the page.
        about: what is compared, in a sentence or two.
        run: yields the name and the result of one item after another.
        detail: the tables of one item.
        overview: the tables of all that were measured, which the README shows.
        seconds: that the rounds may take, in a full run and in a quick one.
        plots: file stems of the plots.
        figures: file stem → plot; from the results and a line that names the machine.
        alone: whether it runs only when it is asked for by name, as it takes long.
        headline: a figure and what it is, for the top of the page; None where there is none.
    """

    name: str
    title: str
    about: str
    run: Callable[[Options], Iterator[tuple[str, Result]]]
    detail: Callable[[Result], list[Table]]
    overview: Callable[[Results], list[Table]]
    seconds: tuple[float, float]
    plots: tuple[str, ...] = ()
    figures: Callable[[Results, str], dict[str, Figure]] = lambda results, machine: {}
    alone: bool = False
    headline: Callable[[Results], tuple[str, str] | None] | None = None
