"""The numbers of a size, and the tables of a job."""

from __future__ import annotations

from typing import Any

from benchmarks.entry import Result, Results
from benchmarks.lists.measure import ROOFLINE, Measurement
from benchmarks.lists.providers import Job
from benchmarks.show.table import Table
from benchmarks.show.text import count, mebibytes, milliseconds, significant, three, times
from benchmarks.tools.timing import spread


def summary(job: Job, measured: Measurement) -> Result:
    """Ratios are medians of per-round ratios, not ratios of medians."""
    useful = job.bytes_per_parameter * measured.parameters
    moved = {p.name: p.moved for p in job.providers} | {ROOFLINE: job.bytes_per_parameter}
    providers = {}
    for name, seconds in measured.seconds.items():
        providers[name] = {
            "seconds": spread(seconds),
            "time_over_ours": spread(measured.ratios(name, job.ours)),
            "time_over_roofline": spread(measured.ratios(name, ROOFLINE)),
            "fraction_of_roofline": spread(measured.ratios(ROOFLINE, name)),
            "gigabytes_per_second": useful / spread(seconds)["median"] / 1e9,
            "bytes_moved": moved[name] * measured.parameters,
            "extra_bytes": measured.extra_bytes.get(name),
        }
    return {
        "title": measured.title,
        "tensors": measured.tensors,
        "parameters": measured.parameters,
        "bytes_of_one_pass": useful,
        "rounds": len(measured.seconds[ROOFLINE]),
        "providers": providers,
        "skipped": measured.skipped,
    }


def detail(job: Job, size: Result) -> list[Table]:
    tensors = "1 tensor" if size["tensors"] == 1 else f"{size['tensors']:,} tensors"
    headings = ("", "ms (quartiles)", "time / ours", "GB/s", "of roofline", "MB moved", "extra MiB")
    return [
        Table(
            f"{job.title}. {size['title']}: {count(size['parameters'])} parameters in {tensors}, "
            f"medians of {size['rounds']} rounds",
            headings,
            [_detail_row(name, row) for name, row in size["providers"].items()],
            frozenset({job.ours}),
            "\n".join(f"{name}: {reason}" for name, reason in size["skipped"].items()),
        )
    ]


def _detail_row(name: str, row: dict[str, Any]) -> list[str]:
    moved = row.get("bytes_moved")
    return [
        name,
        milliseconds(row["seconds"]),
        significant(row["time_over_ours"]["median"]),
        significant(row["gigabytes_per_second"]),
        significant(row["fraction_of_roofline"]["median"]),
        "–" if moved is None else three(moved / 1e6),
        mebibytes(row.get("extra_bytes")),
    ]


def overview(job: Job, sizes: Results) -> list[Table]:
    """A column a size: milliseconds, and in brackets the time over ours."""
    fraction = "its fraction of the roofline"
    rows = []
    for provider in job.providers:
        cells = [_time(size, provider.name, job.ours) for size in sizes.values()]
        rows.append([provider.name, *cells])
        if provider.name == job.ours:
            rows.append([fraction, *(_fraction(size, job.ours) for size in sizes.values())])
    headings = (job.name, *(_column(size) for size in sizes.values()))
    title = f"{job.title}: milliseconds, and in brackets the time over {job.ours}"
    return [Table(title, headings, rows, frozenset({job.ours}))]


def _column(size: Result) -> str:
    return f"{size['title']} ({count(size['parameters'])})"


def _time(size: Result, name: str, ours: str) -> str:
    row = size["providers"].get(name)
    if row is None:
        return "–"
    time = three(row["seconds"]["median"] * 1e3)
    return time if name == ours else f"{time} ({significant(row['time_over_ours']['median'])})"


def _fraction(size: Result, ours: str) -> str:
    return significant(size["providers"][ours]["fraction_of_roofline"]["median"])


def headline(job: Job, sizes: Results) -> tuple[str, str] | None:
    """Ours against the fastest other that is handed the same list, at the largest size."""
    size = max(sizes.values(), key=lambda size: size["parameters"])
    others = {p.name for p in job.providers if not p.flat and p.name != job.ours}
    found = {n: row["time_over_ours"]["median"] for n, row in size["providers"].items()}
    rivals = {name: ratio for name, ratio in found.items() if name in others}
    if not rivals:
        return None
    best = min(rivals, key=rivals.__getitem__)
    share = significant(size["providers"][job.ours]["fraction_of_roofline"]["median"])
    return times(rivals[best]), (
        f"the time of {job.ours} is what {best} takes, the fastest other on the same list, for "
        f"{count(size['parameters'])} parameters; {job.ours} itself is at {share} of the roofline"
    )
