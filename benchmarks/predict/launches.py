"""How a way is cut into kernels: ours by tables, foreach by its own, inductor by its reductions.

A launch here is a kernel as the device sees it: what it moves, and how much of that is under way at
once, which is what decides the speed of a kernel that does not fill the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import isqrt
from typing import NamedTuple

from benchmarks.predict.gpus import Gpu
from benchmarks.predict.traffic import (
    AUTOGRAD,
    COMPILED,
    EAGER,
    FOREACH,
    FUSED,
    FUSED_AUTOGRAD,
    ITEMSIZE,
    LISTS,
    Kernel,
    Phase,
    Way,
    is_mixed,
    width,
)

# csrc/cuda: tests/test_predictions.py holds these against the sources.
THREADS, CHUNK, UNROLL, VECTOR_BYTES, TABLE_BYTES = 256, 8192, 2, 16, 28672
ENTRY_BYTES = 16  # of a tensor in a table, beside its pointers
# Blocks of ours on an SM: `python -m tests.sass` says 4 for most of them in float32 on sm_90, and 2
# to 8 for the others, which is more than it takes to keep the memory busy.
RESIDENT = 4
FINISH_UNROLL = 8  # loads of a partial sum that a thread of the finishing block has under way
# ATen's multi_tensor_apply, by the number of lists, for CUDA 13 and before it.
FOREACH_CHUNK, FOREACH_THREADS, FOREACH_VECTOR = 65536, 512, 4
FOREACH_TENSORS = {13: (770, 448, 336, 252, 210), 12: (110, 64, 48, 36, 30)}
FOREACH_BLOCKS = {13: 2240, 12: 320}
ELEMENTWISE = 1024  # elements a block of an element-wise kernel of ATen or inductor, about
REDUCED_AT_ONCE = 2048  # elements that a block of inductor's reductions reads at a time, about


class Launch(NamedTuple):
    """``count`` alike. ``missed``: of the bytes moved, those that no cache holds."""

    moved: float
    missed: float
    elements: float
    blocks: int
    in_flight: float  # bytes a block asks for before it waits
    resident: int  # blocks an SM holds at once, at most
    count: int = 1


def table_capacity(streams: int) -> int:
    """Tensors that one launch of ours takes: Table::kCapacity."""
    return TABLE_BYTES // (8 * streams + ENTRY_BYTES)


def tables(tensors: int, streams: int) -> int:
    """Launches that a list of one dtype takes."""
    return -(-tensors // table_capacity(streams))


def chunks_in(sizes: Counter[int], chunk: int = CHUNK) -> int:
    return sum(-(-numel // chunk) * count for numel, count in sizes.items())


def foreach_launches(sizes: Sequence[int], lists: int, cuda: int = 13) -> int:
    """Full when it has as many tensors, or as many chunks, as its argument holds."""
    most_tensors, most_blocks = FOREACH_TENSORS[cuda][lists - 1], FOREACH_BLOCKS[cuda]
    launches = tensors = blocks = 0
    for numel in sizes:
        tensors += 1
        left = -(-numel // FOREACH_CHUNK)
        while left:
            taken = min(left, most_blocks - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == most_blocks or (tensors == most_tensors and not left):
                launches, blocks, tensors = launches + 1, 0, 1 if left else 0
    return launches + (blocks > 0)


def inductor_splits(numel: int, gpu: Gpu) -> int:
    """Pieces into which inductor (torch 2.14) cuts a sum over ``numel`` elements.

    If they are of one size, the kernel that sums also writes the gradient. If not, memory is read
    a second time for that.
    """
    threads, least, most = 256, 32, 512
    if numel <= least * threads:
        return 1
    device = gpu.sms * gpu.threads
    a_thread, tolerance = least, 0
    if numel >= most * device:
        a_thread, tolerance = most, 50
    elif numel > least * device:
        blocks = device // (2 * threads)
        a_thread, tolerance = -(-numel // (threads * blocks)), 30
    closest = _closest_divisor(numel, a_thread) if tolerance else a_thread
    if abs(closest - a_thread) < tolerance:
        a_thread = max(closest, least)
    return -(-numel // (a_thread * threads))


def _closest_divisor(numel: int, to: int) -> int:
    below = (d for d in range(1, isqrt(numel) + 1) if numel % d == 0)
    return min((e for d in below for e in (d, numel // d)), key=lambda d: (abs(d - to), d))


def launches(
    way: Way, dtype: str, sizes: Sequence[int], gpu: Gpu, cache: float, is_warm: bool = True
) -> list[Launch]:
    """All kernels of a call. ``cache``: bytes that a later kernel still finds there.

    ``is_warm``: what the last call left there is still there.
    """
    if way.is_flat:
        sizes = [sum(sizes)]
    done: list[Launch] = []
    fits = is_warm and _footprint(way, dtype, sum(sizes)) <= cache
    for number, phase in enumerate(way.of(dtype)):
        later = "".join(k.reads for after in way.of(dtype)[number + 1 :] for k in after)
        done += _phase(way, phase, later, dtype, sizes, gpu, cache, fits)
    if way.small:
        done.append(Launch(12, 0, 1, 1, 12, 1, way.small * len(sizes)))
    return done


def _footprint(way: Way, dtype: str, numel: int) -> int:
    """What a call touches, which is in the cache at the next call if it fits there."""
    kernels = [kernel for phase in way.of(dtype) for kernel in phase]
    touched = {stream for kernel in kernels for stream in kernel.reads + kernel.writes}
    if way.style == EAGER:  # its temporaries are those of one tensor, and small
        touched &= set(LISTS)
    return numel * sum(width(stream, dtype) for stream in touched)


def _phase(
    way: Way,
    phase: Phase,
    later: str,
    dtype: str,
    sizes: Sequence[int],
    gpu: Gpu,
    cache: float,
    fits: bool,
) -> Iterator[Launch]:
    counted = Counter(sizes)
    style = _style(way.style, phase[0], dtype)
    if style == FUSED:
        yield from _fused(phase[0], way, dtype, counted, fits)
    elif style == FOREACH:
        yield _foreach(phase[0], dtype, sizes, fits)
    else:
        for numel, count in counted.items():
            missed = _missed(phase, later, dtype, numel, cache, fits)
            for kernel, miss in zip(phase, missed, strict=True):
                if style == COMPILED:
                    yield from _compiled(kernel, way, dtype, numel, count, gpu, fits)
                else:
                    yield _elementwise(kernel, dtype, numel, count, miss)


def _style(style: str, kernel: Kernel, dtype: str) -> str:
    """What autograd adds, it adds tensor by tensor. foreach has no sum, and no mixed dtypes."""
    if style == FUSED_AUTOGRAD:
        return EAGER if kernel.reads == "gk" else FUSED
    if style == FOREACH:
        streams = kernel.reads + kernel.writes
        differ = len({stream.isupper() for stream in streams}) > 1 and is_mixed(dtype)
        return EAGER if differ or not kernel.writes else FOREACH
    return EAGER if style == AUTOGRAD else style


def _fused(
    kernel: Kernel, way: Way, dtype: str, sizes: Counter[int], fits: bool
) -> Iterator[Launch]:
    elements = sum(sizes.elements())
    blocks, vector = chunks_in(sizes), VECTOR_BYTES // ITEMSIZE[dtype]
    moved = elements * kernel.bytes(dtype) + 8 * blocks * way.sums
    in_flight = THREADS * UNROLL * vector * kernel.bytes_read(dtype)
    count = tables(sum(sizes.values()), len(set(kernel.reads + kernel.writes)))
    share = [value / count for value in (moved, 0 if fits else moved, elements)]
    yield Launch(*share, -(-blocks // count), in_flight, RESIDENT, count)
    if way.sums:
        asked = THREADS * FINISH_UNROLL * 8
        yield Launch(8 * blocks, 0, blocks, 1, asked, 1)


def _foreach(kernel: Kernel, dtype: str, sizes: Sequence[int], fits: bool) -> Launch:
    elements = sum(sizes)
    moved = elements * kernel.bytes(dtype)
    count = foreach_launches(sizes, len(set(kernel.reads + kernel.writes)))
    blocks = chunks_in(Counter(sizes), FOREACH_CHUNK)
    in_flight = FOREACH_THREADS * FOREACH_VECTOR * kernel.bytes_read(dtype)
    share = [value / count for value in (moved, 0 if fits else moved, elements)]
    return Launch(*share, -(-blocks // count), in_flight, 4, count)


def _elementwise(kernel: Kernel, dtype: str, numel: int, count: int, missed: int) -> Launch:
    in_flight = ELEMENTWISE * kernel.bytes_read(dtype)
    moved = numel * kernel.bytes(dtype)
    return Launch(moved, numel * missed, numel, -(-numel // ELEMENTWISE), in_flight, 8, count)


def _compiled(
    kernel: Kernel, way: Way, dtype: str, numel: int, count: int, gpu: Gpu, fits: bool
) -> Iterator[Launch]:
    """Fused where the sum can be cut evenly; else the sum first, then the rest.

    A temporary ties the two halves of the fused kernel, and only those.
    """
    if not way.sums:
        yield _elementwise(kernel, dtype, numel, count, 0 if fits else kernel.bytes(dtype))
        return
    splits = inductor_splits(numel, gpu)
    is_fused = numel % splits == 0 or not kernel.writes
    first = kernel if is_fused else Kernel("paO", "")
    moved = numel * first.bytes(dtype)
    in_flight = min(REDUCED_AT_ONCE, -(-numel // splits)) * first.bytes_read(dtype)
    yield Launch(moved, 0 if fits else moved, numel, splits, in_flight, 4, count)
    if splits > 1:
        yield Launch(4 * splits, 0, splits, 1, 4 * splits, 1, count)
    if not is_fused:
        rest = Kernel(kernel.reads.replace("m", ""), kernel.writes.replace("m", ""))
        yield _elementwise(rest, dtype, numel, count, 0 if fits else rest.bytes(dtype))


def _missed(
    phase: Phase, later: str, dtype: str, numel: int, cache: float, fits: bool
) -> list[int]:
    """Bytes an element that each kernel moves to and from memory, and not only the cache.

    A stream is found there if what was moved since it was last touched leaves room. A temporary
    that is done with within the phase is overwritten by the next tensor's before it is ever
    written back, if it stays in the cache for as long as that.
    """
    if fits:
        return [0] * len(phase)
    since: dict[str, int] = {}  # a stream was touched: bytes an element that were moved then
    missed = []
    for number, kernel in enumerate(phase):
        own = kernel.bytes(dtype)
        since = {stream: moved + own for stream, moved in since.items()}
        lost = [s for s in kernel.reads if since.get(s, cache) * numel >= cache]
        rest = "".join(after.reads for after in phase[number + 1 :])
        for stream in kernel.writes:
            is_done_with = stream in rest and stream not in later + LISTS
            if not is_done_with or 2 * own * numel > cache:
                lost.append(stream)
        since |= dict.fromkeys(kernel.reads + kernel.writes, 0)
        missed.append(sum(width(stream, dtype) for stream in lost))
    return missed
