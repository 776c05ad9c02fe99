"""``python -m benchmarks predict``: the predictions as tables, JSON and a picture."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.abs_matmul import CASES, SAMPLES
from benchmarks.predict import plot
from benchmarks.predict.abs_matmul import WAYS, Problem, predict_abs_matmul
from benchmarks.predict.gpus import GPUS, Gpu
from benchmarks.predict.model import FAST, LIKELY, SLOW, Prediction, duration, predict
from benchmarks.predict.sizes import Size, sizes
from benchmarks.predict.traffic import JOBS, OURS
from benchmarks.runner import write_json
from benchmarks.show.text import significant, times

LABEL = "PREDICTED from data sheets and counted traffic; no GPU has run this"
DTYPES = ("float32", "bfloat16")
# Beyond the benchmark's own: a ViT-B layer with 197 positions, and one of a 7 B model.
PROBLEMS = [
    *(Problem(SAMPLES, case.positions, case.p, case.d) for case in CASES if not case.conv),
    *(Problem(SAMPLES, case.positions, case.p, case.d) for case in CASES[8:12]),
    Problem(32, 197, 768, 3072),
    Problem(8, 1024, 4096, 4096),
]
Predictions = dict[str, dict[str, dict[str, dict[str, Prediction]]]]


def predictions(gpu: Gpu, models: dict[str, Size]) -> Predictions:
    """By job, model, dtype and way."""
    return {
        job: {
            name: {
                dtype: {way: predict(job, way, dtype, size.numels, gpu) for way in ways}
                for dtype in DTYPES
            }
            for name, size in models.items()
        }
        for job, ways in JOBS.items()
    }


def _table(title: str, first: str, headings: list[str], caption: str = "") -> Table:
    table = Table(title=f"{title}\n[bold red]{LABEL}", caption=caption, min_width=84)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _cell(prediction: Prediction, ours: Prediction, memory: float) -> str:
    ratio = f" [dim]({times(prediction.seconds / ours.seconds)})[/dim]"
    marks = " h" * (prediction.bound == "host") + " †" * (prediction.memory > memory)
    return f"{duration(prediction.seconds)}{ratio * (prediction is not ours)}{marks}"


def job_table(
    job: str, dtype: str, gpu: Gpu, models: dict[str, Size], predicted: Predictions
) -> Table:
    table = _table(
        f"{job}, {dtype} parameters, {gpu.name}",
        "",
        ["B", *(size.short for size in models.values())],
        "B: bytes an element read and written, where inductor cuts sums evenly; (time over ours)"
        "\nh: bound by the host that launches    †: needs more memory than this GPU has",
    )
    for way, stated in JOBS[job].items():
        rows = [predicted[job][name][dtype] for name in models]
        cells = [_cell(row[way], row[OURS], gpu.memory) for row in rows]
        style = "bold green" if way == OURS else None
        table.add_row(way, str(stated.bytes(dtype)), *cells, style=style)
    return table


def ours_table(gpus: list[Gpu], models: dict[str, Size]) -> Table:
    """One operator on every GPU: what its bandwidth makes of it."""
    table = _table(
        f"add_penalty_grad_ by {OURS}, float32: the device's time",
        "",
        ["TB/s", *(size.short for size in models.values())],
        "†: needs more memory than this GPU has",
    )
    for gpu in gpus:
        cells = []
        for size in models.values():
            found = predict("add_penalty_grad_", OURS, "float32", size.numels, gpu)
            cells.append(f"{duration(found.device_seconds)}{' †' * (found.memory > gpu.memory)}")
        table.add_row(gpu.name, f"{gpu.bandwidth / 1e12:.2f}", *cells)
    return table


def abs_matmul_table(dtype: str, gpu: Gpu) -> Table:
    table = _table(
        f"accumulate_abs_matmul_, {dtype}, {gpu.name}",
        "Ω, samples × positions",
        [OURS, "chunks", "bmm", "mm", "TFLOP/s", "bound by", "tiles/SM"],
        "bmm: then abs and sum, of all samples or in chunks that fit L2; TFLOP/s: ours\n"
        "mm: one product of the same FLOPs, which a batch's mean gradient costs",
    )
    for problem in PROBLEMS:
        row = {way: predict_abs_matmul(way, dtype, problem, gpu) for way in WAYS}
        ours = row[OURS]
        table.add_row(
            f"{problem.p} × {problem.d}, {problem.samples} × {problem.positions}",
            *(duration(found.seconds) for found in row.values()),
            f"{problem.flops / ours.seconds / 1e12:.3g}",
            ours.bound,
            significant(problem.tiles / gpu.sms),
        )
    return table


def _rounded(value: Any) -> Any:
    """Four significant digits: more would be a pretence."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, float) and value:
        return round(value, 3 - math.floor(math.log10(abs(value))))
    return value


def _as_json(gpu: Gpu, models: dict[str, Size], predicted: Predictions) -> dict[str, Any]:
    return {
        "gpu": asdict(gpu),
        "jobs": {
            job: {
                name: {
                    dtype: {way: found.as_dict() for way, found in ways.items()}
                    for dtype, ways in dtypes.items()
                }
                for name, dtypes in of_models.items()
            }
            for job, of_models in predicted.items()
        },
        "accumulate_abs_matmul_": [
            asdict(problem)
            | {
                dtype: {way: asdict(predict_abs_matmul(way, dtype, problem, gpu)) for way in WAYS}
                for dtype in DTYPES
            }
            for problem in PROBLEMS
        ],
    }


def run(names: list[str], out: Path, console: Console) -> None:
    models, gpus = sizes(), [GPUS[name] for name in names]
    written: dict[str, Any] = {
        "what": LABEL,
        "assumptions": {"likely": asdict(LIKELY), "fast": asdict(FAST), "slow": asdict(SLOW)},
        "models": {
            name: {"title": size.title, "tensors": len(size.numels), "parameters": sum(size.numels)}
            for name, size in models.items()
        },
        "gpus": {},
    }
    for name, gpu in zip(names, gpus, strict=True):
        predicted = predictions(gpu, models)
        for job in JOBS:
            for dtype in DTYPES:
                console.print(job_table(job, dtype, gpu, models, predicted), end="\n\n")
        for dtype in DTYPES:
            console.print(abs_matmul_table(dtype, gpu), end="\n\n")
        written["gpus"][name] = _as_json(gpu, models, predicted)
    console.print(ours_table(list(GPUS.values()), models), end="\n\n")
    write_json(out / "predict.json", _rounded(written))
    console.print(f"wrote {out / 'predict.json'}")
    for name, gpu in zip(names, gpus, strict=True):
        stem = "predict" if len(names) == 1 else f"predict-{name}"
        console.print(f"wrote {plot.draw(gpu, models, out / f'{stem}.png')}")
