"""A job as a benchmark of the command."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.entry import Entry, Options, Result
from benchmarks.lists import plot, show
from benchmarks.lists.measure import measure
from benchmarks.lists.providers import Job
from benchmarks.lists.shapes import SIZES


def entry(job: Job) -> Entry:
    return Entry(
        name=job.name,
        title=job.title,
        about=job.about,
        run=partial(_run, job),
        detail=partial(show.detail, job),
        overview=partial(show.overview, job),
        plots=(job.name,),
        figures=lambda sizes, machine: {job.name: plot.figure(job, sizes, machine)},
        seconds=(5 * len(job.sizes), 4),
        headline=partial(show.headline, job),
    )


def _run(job: Job, options: Options) -> Iterator[tuple[str, Result]]:
    asked = options.sizes or (job.quick if options.quick else job.sizes)
    names = [name for name in asked if name in job.sizes]
    budget = options.seconds / max(1, len(names))
    for name in names:
        size = SIZES[name]

        def tell(text: str, title: str = size.title) -> None:
            options.tell(f"{title}: {text}")

        measured = measure(job, size, options.rounds, tell, budget, options.quick)
        yield name, show.summary(job, measured)
