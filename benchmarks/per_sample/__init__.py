"""What the exact importance of a batch costs, next to everything else that computes it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import perf_counter

from torch import Tensor

from benchmarks.benchmark import Benchmark, Options, Result
from benchmarks.measure import can_measure_memory, interleave, ratios, spread
from benchmarks.models import WORKLOADS, Batch, Workload
from benchmarks.per_sample import memory
from benchmarks.per_sample.floor import FLOOR, floor
from benchmarks.per_sample.providers import (
    BATCH_MEAN,
    BATCH_MEANS,
    BATCH_SIZE_1,
    FISHER,
    MAS,
    MAS_SQUARE,
    OUR_SQUARE,
    OURS,
    UNCHUNKED,
    Quantity,
    Step,
    Unsupported,
    chunks,
    in_chunks,
    providers,
    take,
    vmapped,
)

QUICK = ("mlp", "cnn")
QUICK_BATCH = 8  # samples
TOLERANCE = 1e-3  # float32
MOST_ROUNDS_SKIPPED = 4  # a slow provider takes part in every fourth round or more often
IN_EVERY_ROUND = (OURS, OUR_SQUARE, FLOOR, *BATCH_MEANS)
SLOW = 0.05  # seconds per batch
MEMORY_OF = (memory.PLAIN, OURS, BATCH_MEAN, BATCH_SIZE_1, UNCHUNKED)  # a process each


def error(omega: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The worst parameter's ‖Ω − expected‖₁/‖expected‖₁, with a floor for those that are zero."""
    assert omega.keys() == expected.keys(), omega.keys() ^ expected.keys()
    floor = 1e-6 * max(e.mean().item() for e in expected.values())

    def of(name: str) -> float:
        e = expected[name].double()
        return ((omega[name].double() - e).abs().mean() / e.mean().clamp_min(floor)).item()

    return max((of(name), name) for name in expected)


def best_chunk(
    workload: Workload, batch: Batch, candidates: Iterable[int], quantity: Quantity = MAS
) -> dict[int, float]:
    """Seconds per sample that vmap takes with each chunk length, the fastest first."""
    model, seconds = workload.model(), {}
    for length in candidates:
        step = vmapped(model, [take(batch, 0, length)], quantity, length=length)
        step()
        seconds[length] = min(_timed(step)[0] for _ in range(2)) / length
    return dict(sorted(seconds.items(), key=lambda item: item[1]))


def _timed(step: Step) -> tuple[float, Mapping[str, Tensor]]:
    begin = perf_counter()
    omega = step()
    return perf_counter() - begin, omega


def _mass(omega: Mapping[str, Tensor]) -> float:
    return sum(o.double().sum().item() for o in omega.values())


class Verified:
    """The providers that agree with batch size 1 on the first batch, and why others are skipped.

    A call adds all batches. A slow provider's adds only the first, whose time dwarfs what a call
    costs once.
    """

    def __init__(
        self, workload: Workload, batches: Sequence[Batch], chunk: int, quantity: Quantity
    ) -> None:
        self.steps: dict[str, Step] = {}
        self.estimates: dict[str, float] = {}  # seconds per batch
        self.skipped: dict[str, str] = {}
        self.kept = 1.0  # the share of Ω that the batch-mean finds
        first = batches[:1]
        self.batches: dict[str, int] = {}  # of a call
        expected = in_chunks(workload.model(), first, quantity, length=1)()
        for name, prepare in providers(chunk, quantity).items():
            try:
                if name == OUR_SQUARE:  # the last one
                    expected = in_chunks(workload.model(), first, MAS_SQUARE, length=1)()
                self.estimates[name], omega = _timed(prepare(workload.model(), first))
                self._verify(name, omega, expected)
                is_slow = name not in IN_EVERY_ROUND and self.estimates[name] > SLOW
                self.batches[name] = 1 if is_slow else len(batches)
                self.steps[name] = prepare(workload.model(), batches[: self.batches[name]])
            except Exception as reason:
                if name in (OURS, OUR_SQUARE, BATCH_SIZE_1, *BATCH_MEANS):
                    raise
                self.skipped[name] = _one_line(reason)
        self.steps[FLOOR] = floor(workload.model(), batches, quantity)  # forms no Ω
        self.batches[FLOOR] = len(batches)

    def _verify(
        self, name: str, omega: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> None:
        if name in BATCH_MEANS:
            kept = _mass(omega) / _mass(expected)
            assert kept <= 1 + TOLERANCE, f"{name} finds {kept} of Ω, and can only find a part"
            off = abs(kept / self.kept - 1)
            assert name == BATCH_MEAN or off <= TOLERANCE, (kept, self.kept)
            self.kept = kept
            return
        off, worst = error(omega, expected)
        if not off <= TOLERANCE:
            raise Unsupported(f"Ω of {worst} is wrong by {off:.0%}")

    def every(self, rounds: int) -> dict[str, int]:
        """Slow providers take part in fewer rounds; ours and what it is compared with in all."""
        estimates = {n: seconds for n, seconds in self.estimates.items() if n in self.steps}
        fastest = min(estimates.values())
        most = min(MOST_ROUNDS_SKIPPED, max(1, (rounds - 1) // 2))
        every = {n: min(most, max(1, int(each / fastest / 4))) for n, each in estimates.items()}
        return {**every, **dict.fromkeys(IN_EVERY_ROUND, 1)}


def _one_line(reason: Exception) -> str:
    text = " ".join(str(reason).split())
    if isinstance(reason, Unsupported):
        return text
    return f"{type(reason).__name__}: {text[:100]}{'…' if len(text) > 100 else ''}"


def extra_memory(workload: str, chunk: int) -> dict[str, int | None]:
    """Bytes at the peak beyond those of a forward and backward pass, two processes at a time."""
    if not can_measure_memory():
        return {}
    with ThreadPoolExecutor(2) as pool:
        used_by = partial(memory.used_by, workload, chunk=chunk)
        used = dict(zip(MEMORY_OF, pool.map(used_by, MEMORY_OF), strict=True))
    plain = used.pop(memory.PLAIN)
    if plain is None:
        return {}
    return {name: None if peak is None else peak - plain for name, peak in used.items()}


def measure(name: str, options: Options, budget: float) -> Result:
    """One model: each quantity, then memory in separate processes."""
    workload = WORKLOADS[name]
    found = measure_quantity(workload, MAS, workload.title, options, budget / 2)
    fisher = measure_quantity(workload, FISHER, f"{workload.title}, Fisher", options, budget / 2)
    options.progress(f"{workload.title}: peak memory, in a process per provider")
    return {
        "title": workload.title,
        "details": workload.details,
        "parameters": sum(p.numel() for p in workload.model().parameters()),
        **found,
        "extra_bytes": {} if options.quick else extra_memory(name, found["chunk"]),
        "fisher": fisher,
    }


def measure_quantity(
    workload: Workload, quantity: Quantity, title: str, options: Options, budget: float
) -> Result:
    """Every provider of a quantity, verified and timed in interleaved rounds."""
    size = QUICK_BATCH if options.quick else workload.batch_size
    count = 1 if options.quick else workload.batches
    batches = list(chunks(workload.batch(count * size), size))
    options.progress(f"{title}: looking for the best chunk of vmap")
    candidates = [4] if options.quick else [2**n for n in range(size.bit_length())]
    chunk = next(iter(best_chunk(workload, batches[0], candidates, quantity)))
    options.progress(f"{title}: verifying against batch size 1")
    verified = Verified(workload, batches, chunk, quantity)
    options.progress(f"{title}: timing at most {options.rounds} rounds")
    every = verified.every(options.rounds)
    calls = interleave(verified.steps, options.rounds, every, budget)
    seconds = {
        name: [each / verified.batches[name] for each in times] for name, times in calls.items()
    }
    reference = min(BATCH_MEANS, key=lambda mean: statistics.median(seconds[mean]))

    def over(provider: str, other: str) -> dict[str, float]:
        """Round by round; the other takes part in every round."""
        return spread(ratios(seconds[provider], seconds[other][:: every[provider]]))

    return {
        "batch_size": size,
        "batches": count,
        "rounds": len(seconds[OURS]),
        "batch_mean": reference,
        "share_kept_by_batch_mean": verified.kept,
        "providers": {
            provider: {
                "rounds": len(values),
                "seconds": spread(values),
                "time_over_batch_mean": over(provider, reference),
                "time_over_ours": over(provider, OURS),
            }
            for provider, values in seconds.items()
        },
        "skipped": verified.skipped,
        "chunk": chunk,
    }


def _run(options: Options) -> Iterator[tuple[str, Result]]:
    names = options.workloads or (QUICK if options.quick else tuple(WORKLOADS))
    for name in names:
        yield name, measure(name, options, options.seconds / len(names))


BENCHMARK = Benchmark(
    name="per_sample",
    title="Exact importance of a batch",
    about="Ω = 1/N Σ_k |∂‖F(x_k)‖²/∂θ| of a model that was measured before, next to everything "
    "else that computes it exactly, and to the batch's mean gradient, which does not. Each call "
    "makes an Ω and adds one to eight batches; times are those of a batch. Then the diagonal of "
    "the empirical Fisher information, 1/N Σ_k (∂ log p(y_k|x_k)/∂θ)².",
    run=_run,
    seconds=(150, 6),
)
