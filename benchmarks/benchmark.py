"""What a benchmark is, and the options of the command line that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]  # of one item (a size, a model, an axis), as JSON
Results = dict[str, Result]  # of one benchmark, by item


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        quick: run few and small items, to show that everything works.
        rounds: the largest number of rounds; the benchmark's time limit may allow fewer.
        seconds: time limit of all rounds of the benchmark, without preparation and checks.
        sizes, workloads: names of items; empty for all.
        seeds: random seeds of the benchmarks that train networks.
        device: of the benchmarks of operators; `make gpu` runs them on a GPU.
        progress: shows what is being done.
    """

    quick: bool
    rounds: int
    seconds: float
    sizes: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    progress: Callable[[str], None] = lambda text: None


def of_cases(
    cases: Sequence[Any], quick: Sequence[Any], measure: Callable[[Any, int, float], Result]
) -> Callable[[Options], Iterator[tuple[str, Result]]]:
    """What runs a benchmark whose items are cases: ``measure(case, rounds, seconds)`` of each."""

    def run(options: Options) -> Iterator[tuple[str, Result]]:
        chosen = quick if options.quick else cases
        for case in chosen:
            options.progress(case.title)
            yield case.title, measure(case, options.rounds, options.seconds / len(chosen))

    return run


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. Its tables are in ``report.TABLES`` and its plots in ``plot.PLOTS``, by name.

    Attributes:
        name: as on the command line.
        title: heading in the report.
        about: what is compared, in a sentence or two.
        run: yields the name and the result of one item after another.
        seconds: time limit of the rounds, of a full run and of a quick one.
        on_request: whether it only runs when it is asked for by name, because it takes long.
    """

    name: str
    title: str
    about: str
    run: Callable[[Options], Iterator[tuple[str, Result]]]
    seconds: tuple[float, float] = (0, 0)
    on_request: bool = False
