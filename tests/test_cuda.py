"""The compiled CUDA kernels on a GPU: what `make gpu` runs.

Collected only where MAS_EXT_TEST_DEVICE=cuda asks for it (see conftest.py); there, a missing GPU or
missing kernels are failures. No machine that builds this project has a GPU.
"""

import pytest
import torch

import mas_ext
from tests import cases
from tests import test_abs_matmul as abs_matmul


def on_device(state: cases.State) -> cases.State:
    """Copied with their strides where dense."""
    return cases.State(*([t.cuda() for t in tensors] for tensors in state.lists().values()))


def test_there_is_a_gpu_and_kernels_for_it():
    assert torch.cuda.is_available()
    assert mas_ext.build_info()["cuda_kernels"]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_against_the_oracle(op, case):
    state = case.state()
    expected = cases.exact_tensors(op, state)
    outcome = cases.call(mas_ext.functional, op, on_device(state))
    for actual, exact in zip(outcome.tensors, expected, strict=True):
        cases.assert_near(actual.cpu(), exact)
    if outcome.value is not None:  # of the proximal step: the penalty after it
        if op == "proximal_step_":
            state.params = [t.cpu() for t in outcome.tensors]
        exact = cases.exact_penalty(state, cases.Scalars().lambda_reg)
        cases.assert_value_near(outcome.value.cpu(), exact, dtype=case.dtype)


@pytest.mark.parametrize("op", cases.PENALTY_OPS)
def test_results_are_the_same_bits_from_run_to_run(op):
    shapes = [(3, 1000, 1000), (17,), (16385,)]
    runs = []
    for _ in range(3):
        state = on_device(cases.make_state([torch.float32] * 3, shapes))
        outcome = cases.call(mas_ext.functional, op, state)
        runs.append([outcome.value, *outcome.tensors])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_a_captured_graph_sees_new_scalars():
    state = on_device(cases.make_state([torch.float32], [(100_000,)]))
    lambda_reg = torch.tensor(0.5, device="cuda")
    arguments = (state.params, state.anchors, state.omega, lambda_reg)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm up, as capture asks for
        mas_ext.functional.penalty(*arguments)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = mas_ext.functional.penalty(*arguments)
    graph.replay()
    first = value.clone()
    lambda_reg.mul_(4)
    graph.replay()
    torch.testing.assert_close(value, 4 * first)


def test_more_tensors_than_one_launch_holds():
    shapes = [(n % 97,) for n in range(3000)]
    state = cases.make_state([torch.float32] * len(shapes), shapes)
    wanted = cases.exact_penalty(state, 0.7)
    outcome = cases.call(mas_ext.functional, "add_penalty_grad_", on_device(state))
    cases.assert_value_near(outcome.value.cpu(), wanted)


def test_tensors_on_different_devices_are_refused():
    state = cases.make_state([torch.float32] * 2, [(3,), (4,)])
    state.params[1] = state.params[1].cuda()
    with pytest.raises(RuntimeError, match=r"params\[1\] is on .*one device"):
        mas_ext.functional.penalty(state.params, state.anchors, state.omega, 1.0)


@pytest.mark.parametrize("layout", abs_matmul.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_abs_matmul_against_the_oracle(dtype, layout):
    # The kernel's tiles are 64 × 64; it stages 16 (sample, position) pairs at a time.
    for size in [*abs_matmul.SIZES, abs_matmul.Size(3, 5, 63, 65), abs_matmul.Size(2, 8, 64, 128)]:
        problem = abs_matmul.make(size, dtype, layout, device="cuda")
        wanted = abs_matmul.exact(problem)
        abs_matmul.assert_near(abs_matmul.call(problem), wanted, str(size))
        abs_matmul.assert_gaps_untouched(problem.omega)


def test_abs_matmul_gives_the_same_bits_from_run_to_run():
    size = abs_matmul.Size(32, 49, 300, 500)
    runs = [abs_matmul.call(abs_matmul.make(size, device="cuda")) for _ in range(3)]
    assert all(torch.equal(runs[0], again) for again in runs[1:])


def test_abs_matmul_refuses_tensors_on_different_devices():
    omega, left, right = abs_matmul.make(abs_matmul.Size(3, 4, 5, 6), device="cuda")
    with pytest.raises(RuntimeError, match=r"right is on cpu but omega is on .*one device"):
        mas_ext.functional.accumulate_abs_matmul_(omega, left, right.cpu())
