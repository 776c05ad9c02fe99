"""The operators and MAS on a GPU, judged on the CPU: the step `equivalence` of `make gpu`.

Collected only where MAS_EXT_TEST_DEVICE names a device (see conftest.py). On ``cuda`` a missing GPU
or missing kernels are failures. On ``cpu`` this is a rehearsal: every test that can runs in small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import mas_ext
from tests import abs_matmul, cases
from tests.gpu import checks

DEVICE = os.environ["MAS_EXT_TEST_DEVICE"]
REHEARSAL = DEVICE == "cpu"

each_op = pytest.mark.parametrize("op", cases.OPS)
each_dtype = pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
needs_gpu = pytest.mark.skipif(REHEARSAL, reason=checks.NEEDS_GPU)


def assert_right(
    op: str,
    state: cases.State,
    scalars: cases.Scalars = cases.Scalars(),  # noqa: B008
) -> cases.Outcome:
    """Runs an operator on what is on the device, and judges all that came of it in float64."""
    before = cases.State(*([t.cpu() for t in tensors] for tensors in state.lists().values()))
    expected = cases.exact_tensors(op, before, scalars)
    outcome = cases.call(mas_ext.functional, op, state, scalars)
    for actual, exact in zip(outcome.tensors, expected, strict=True):
        cases.assert_near(actual.cpu(), exact)
        abs_matmul.assert_gaps_untouched(actual)
    if outcome.value is not None:
        assert_right_value(op, before, outcome, scalars)
    return outcome


def assert_right_value(
    op: str, state: cases.State, outcome: cases.Outcome, scalars: cases.Scalars
) -> None:
    if op == "proximal_step_":  # its value is the penalty after it
        state.params = [t.cpu() for t in outcome.tensors]
    all_double = bool(state.params) and all(t.dtype == torch.float64 for t in state.params)
    exact = cases.exact_penalty(state, scalars.lambda_reg)
    terms = torch.float64 if all_double else torch.float32
    cases.assert_value_near(outcome.value.cpu(), exact, dtype=terms)


# ================================================================================================
# The operators on lists
# ================================================================================================
@needs_gpu
def test_there_is_a_gpu_and_kernels_for_it() -> None:
    assert torch.cuda.is_available()
    assert mas_ext.build_info()["cuda_kernels"]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
@each_op
def test_against_the_oracle(op: str, case: cases.Case) -> None:
    assert_right(op, case.state(DEVICE))


VECTOR = 16  # bytes


@each_dtype
@each_op
def test_views_at_every_distance_from_a_vector_boundary(op: str, dtype: torch.dtype) -> None:
    """All streams off by as many elements, which can still be walked by vectors; then one alone."""
    for elements in range(1, VECTOR // dtype.itemsize):
        for shifted in ("all", *cases.list_arguments(op)):
            state = cases.make_state([dtype] * 2, [(8193,), (37,)], device=DEVICE)
            for name, tensors in state.lists().items():
                if shifted in ("all", name):
                    tensors[:] = [cases.behind(t, elements) for t in tensors]
            assert_right(op, state)


@each_op
def test_mixed_dtypes_in_one_list(op: str) -> None:
    dtypes = [*cases.DTYPES.values()] * 3
    shapes = [(8193,), (5, 7), (), (0,), (17,), (128, 65), (1,), (3,), (33,), (16384,), (2,), (9,)]
    assert_right(op, cases.make_state(dtypes, shapes, device=DEVICE))


@each_op
def test_more_tensors_than_one_launch_holds(op: str) -> None:
    shapes = [(n % 97,) for n in range(3000)]
    dtypes = [torch.bfloat16 if n % 7 == 0 else torch.float32 for n in range(3000)]
    assert_right(op, cases.make_state(dtypes, shapes, device=DEVICE))


@each_op
def test_results_are_the_same_bits_from_run_to_run(op: str) -> None:
    shapes = [(3, 1000, 1000), (17,), (16385,)]
    runs = []
    for _ in range(3):
        outcome = cases.call(
            mas_ext.functional, op, cases.make_state([torch.float32] * 3, shapes, device=DEVICE)
        )
        runs.append([t for t in (outcome.value, *outcome.tensors) if t is not None])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


# ================================================================================================
# More elements than 32 bits count
# ================================================================================================
BEYOND = 2**31 + 8193 if not REHEARSAL else 3 * 8192 + 11
SLICE = 2**27
# Where a wrong index would show: at the ends, and around what 31 bits (or a chunk) count.
PLACES = [0, 8191, 8192, BEYOND // 2, BEYOND - 8194, BEYOND - 8193, BEYOND - 1]


def constant(value: float, marks: list[float], dtype: torch.dtype) -> Tensor:
    tensor = torch.full((BEYOND,), value, dtype=dtype, device=DEVICE)
    for place, mark in zip(PLACES, marks, strict=True):
        tensor[place] = mark
    return tensor


def skip_without_memory(bytes_per_element: int) -> None:
    if REHEARSAL:
        return
    torch.cuda.empty_cache()
    needed = 1.1 * BEYOND * bytes_per_element
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"{checks.NOT_HERE}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


def assert_constant_but(tensor: Tensor, value: float, marks: list[float]) -> None:
    """Slice by slice, so that nothing of the tensor's size is made beside it."""
    others = sum(int((part != value).sum()) for part in tensor.split(SLICE))
    assert [tensor[place].item() for place in PLACES] == marks
    assert others == sum(mark != value for mark in marks)


@each_op
def test_one_tensor_of_more_than_two_to_the_31_elements(op: str) -> None:
    """Constants but for a few places, so that every element's result is known exactly.

    θ = 2, θ* = 1, Ω = ½, g = 1; at the marked places θ = 3, 4, …. λ, s and ηλ are powers of two.
    """
    names = cases.list_arguments(op)
    returned = 2 if op == "penalty_and_grad" else 0
    skip_without_memory(sum(4 if name == "omega" else 2 for name in names) + returned)
    count = len(PLACES)
    thetas = [3.0 + k for k in range(count)]
    columns = {
        "params": (2.0, thetas, torch.bfloat16),
        "anchors": (1.0, [1.0] * count, torch.bfloat16),
        "omega": (0.5, [0.5] * count, torch.float32),
        "grads": (1.0, thetas, torch.bfloat16),
    }
    state = cases.State(*([constant(*columns[name])] if name in names else [] for name in columns))
    scalars = cases.Scalars(lambda_reg=2.0, grad_scale=4.0, lr=1.0, scale=0.5)
    outcome = cases.call(mas_ext.functional, op, state, scalars)
    by_element = {  # each as a function of the only thing that varies
        "accumulate_importance_": lambda theta, g: 0.5 + 0.5 * g,
        "penalty_and_grad": lambda theta, g: theta - 1,
        "add_penalty_grad_": lambda theta, g: g + 4 * (theta - 1),
        "proximal_step_": lambda theta, g: (theta + 1) / 2,
    }
    if outcome.tensors:
        formula = by_element[op]
        (written,) = outcome.tensors
        assert_constant_but(written, formula(2.0, 1.0), [formula(t, t) for t in thetas])
    if outcome.value is not None:
        after = by_element[op] if op == "proximal_step_" else lambda theta, g: theta
        squares = [(after(t, t) - 1) ** 2 for t in thetas]
        exact = 0.5 * ((BEYOND - count) * (after(2.0, 1.0) - 1) ** 2 + sum(squares))
        cases.assert_value_near(outcome.value.cpu(), exact)


# ================================================================================================
# Streams, devices, scalars
# ================================================================================================
@contextmanager
def behind_a_long_kernel() -> Iterator[None]:
    """A stream of its own that is busy: what does not wait for it comes too early."""
    if REHEARSAL:
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        yield
    torch.cuda.synchronize()


@each_op
def test_on_a_stream_that_is_not_the_default(op: str) -> None:
    values = cases.make_state([torch.float32] * 2, [(100_000,), (3,)])
    expected = cases.exact_tensors(op, values)
    state = cases.State(
        *([torch.zeros_like(t, device=DEVICE) for t in ts] for ts in vars(values).values())
    )
    sources = [t if REHEARSAL else t.pin_memory() for ts in values.lists().values() for t in ts]
    targets = [t for ts in state.lists().values() for t in ts]
    with behind_a_long_kernel():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        outcome = cases.call(mas_ext.functional, op, state)
    for actual, exact in zip(outcome.tensors, expected, strict=True):
        cases.assert_near(actual.cpu(), exact)
    if outcome.value is not None:
        assert_right_value(op, values, outcome, cases.Scalars())


@needs_gpu
@each_op
def test_on_a_device_that_is_not_the_current(op: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{checks.NOT_HERE}: one GPU, and this needs two")
    outcome = assert_right(op, cases.make_state([torch.float32], [(20_000,)], device="cuda:1"))
    results = [t for t in (outcome.value, *outcome.tensors) if t is not None]
    assert all(t.device == torch.device("cuda:1") for t in results)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", cases.PENALTY_OPS)
def test_scalars_as_tensors(op: str, dtype: torch.dtype, where: str) -> None:
    tensors = cases.Scalars().as_tensors(dtype)
    if where == "device":
        tensors = cases.Scalars(*(t.to(DEVICE) for t in tensors[:3]), scale=tensors.scale)
    for kind in cases.DTYPES.values():
        assert_right(op, cases.make_state([kind] * 2, [(9000,), (5,)], device=DEVICE), tensors)


@needs_gpu
def test_tensors_on_different_devices_are_refused() -> None:
    state = cases.make_state([torch.float32] * 2, [(3,), (4,)])
    state.params[1] = state.params[1].cuda()
    with pytest.raises(RuntimeError, match=r"params\[1\] is on .*one device"):
        mas_ext.functional.penalty(state.params, state.anchors, state.omega, 1.0)


# ================================================================================================
# accumulate_abs_matmul_
# ================================================================================================
# The CUDA kernel's tiles are 64 × 64; it stages 16 (sample, position) pairs at a time.
SIZES = [*abs_matmul.SIZES, abs_matmul.Size(3, 5, 63, 65), abs_matmul.Size(2, 8, 64, 128)]


@pytest.mark.parametrize("layout", abs_matmul.LAYOUTS)
@each_dtype
def test_abs_matmul_against_the_oracle(dtype: torch.dtype, layout: str) -> None:
    for size in SIZES:
        problem = abs_matmul.make(size, dtype, layout, device=DEVICE)
        wanted = abs_matmul.exact(problem)
        abs_matmul.assert_near(abs_matmul.call(problem), wanted, str(size))
        abs_matmul.assert_gaps_untouched(problem.omega)


def test_abs_matmul_gives_the_same_bits_from_run_to_run() -> None:
    size = abs_matmul.Size(32, 49, 300, 500)
    runs = [abs_matmul.call(abs_matmul.make(size, device=DEVICE)) for _ in range(3)]
    assert all(torch.equal(runs[0], again) for again in runs[1:])


@needs_gpu
def test_abs_matmul_refuses_tensors_on_different_devices() -> None:
    omega, left, right = abs_matmul.make(abs_matmul.Size(3, 4, 5, 6), device="cuda")
    with pytest.raises(RuntimeError, match=r"right is on cpu but omega is on .*one device"):
        mas_ext.functional.accumulate_abs_matmul_(omega, left, right.cpu())


# ================================================================================================
# MAS from end to end
# ================================================================================================
def network(device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Every rule that launches accumulate_abs_matmul_: convolution, positions, a plain layer."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Linear(36, 20),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(160, 5),
    ]
    return nn.Sequential(*layers).to(device, dtype)


def images(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(device, dtype)


@contextmanager
def no_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def live_through_two_tasks(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """All that MAS does, on one device; returns what can be looked at afterwards, on the CPU."""
    model, data = network(device, dtype), images(device, dtype)
    mas = mas_ext.MAS(model, lambda_reg=3.0)
    mas.update_importance([data[:7], data[7:]])
    mas.consolidate([data.flip(0)], estimator="batch")
    seen: dict[str, Tensor] = {f"omega 1 {n}": t.clone() for n, t in mas.importance.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        seen[f"penalty {step}"] = mas.add_penalty_grad_()
        optimizer.step()
        seen[f"penalty after {step}"] = mas.proximal_step_(0.01)
    optimizer.zero_grad()
    mas.penalty().backward()
    seen |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters()}
    mas.consolidate([data])
    seen |= {f"omega 2 {n}": t for n, t in mas.importance.items()}
    seen |= {f"parameter {n}": p.detach() for n, p in model.named_parameters()}
    return {name: value.detach().cpu() for name, value in seen.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mas_on_the_device_is_mas_on_the_cpu(dtype: torch.dtype) -> None:
    with no_tf32():
        here = live_through_two_tasks(DEVICE, dtype)
    there = live_through_two_tasks("cpu", dtype)
    bound = {torch.float64: 1e-9, torch.float32: 2e-3}[dtype]
    for name, value in there.items():
        torch.testing.assert_close(
            here[name],
            value,
            rtol=bound,
            atol=bound * float(value.abs().max()),
            msg=f"{name} differs",
        )


def test_per_sample_importance_takes_the_fast_path_on_the_device() -> None:
    """With the defaults, where convolutions may run in TF32: no fallback, and no warning of one."""
    measured = mas_ext.estimate_importance(network(DEVICE), [images(DEVICE)])
    assert set(measured.coverage.values()) == {"direct"}


@pytest.mark.parametrize("source", ["cpu", "device"])
def test_a_state_goes_to_another_mas_and_device(source: str) -> None:
    place = DEVICE if source == "device" else "cpu"
    first = mas_ext.MAS(network(place), lambda_reg=0.5)
    first.consolidate([images(place)])
    first.update_importance([images(place)])
    model = network(DEVICE)
    second = mas_ext.MAS(model)
    second.load_state_dict(first.state_dict())
    for mine, theirs in ((second.importance, first.importance), (second.anchor, first.anchor)):
        assert all(t.device.type == DEVICE for t in mine.values())
        assert all(torch.equal(mine[name].cpu(), theirs[name].cpu()) for name in theirs)
    assert second.lambda_reg == 0.5
    assert float(second.add_penalty_grad_()) == 0.0  # the model is at its anchors
    second.consolidate()  # of what was measured before the state was taken
    assert second.num_tasks == 2


# ================================================================================================
# Inside a fused optimizer, under a loss scaler
# ================================================================================================
RATE = 1e-3
SCALE = 2.0**10  # a power of two: scaling and unscaling change no bit


def prepared(mode: str) -> tuple[nn.Module, torch.optim.Optimizer, mas_ext.MAS]:
    """A network that has moved away from its anchors, and MAS attached to its fused optimizer."""
    model = network(DEVICE).eval()
    mas = mas_ext.MAS(model, lambda_reg=2.0)
    mas.consolidate([images(DEVICE)])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    mas.attach(optimizer, mode=mode)
    return model, optimizer, mas


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler=None, loss_factor=1.0) -> None:
    optimizer.zero_grad()
    loss = model(images(DEVICE)).square().mean() * loss_factor
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])


@each_mode
def test_a_scaled_step_of_a_fused_optimizer_is_an_unscaled_one(mode: str) -> None:
    (plain, plain_optimizer, _), (scaled, optimizer, _) = prepared(mode), prepared(mode)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    for _ in range(3):
        step(plain, plain_optimizer)
        step(scaled, optimizer, scaler)
    for mine, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-2 * RATE)


@each_mode
def test_a_step_that_overflowed_is_skipped_with_all_of_mas(mode: str) -> None:
    model, optimizer, _ = prepared(mode)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=SCALE)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer, scaler, loss_factor=float("inf"))
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() < SCALE
    step(model, optimizer, scaler)
    assert not any(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
