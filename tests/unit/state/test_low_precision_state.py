"""Ω stored in bfloat16 or in codes: what is lost, what mustn't be, and the memory it takes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mas_ext import MAS, estimate_importance
from mas_ext._state.importance_state import _PIECE, ImportanceState
from mas_ext._state.stored_importance import StoredImportance
from mas_ext._state.task_accumulator import TaskAccumulator
from mas_ext.precision import (
    BLOCK,
    dequantize,
    num_scales,
    quantize_,
    round_to_bfloat16,
    rounding_thresholds,
)
from tests.support.regularizers import MERGES, assert_states_equal, move
from tests.support.zoo.small import mlp, vectors

X = vectors(dtype=torch.float32)
NARROW = ("bfloat16", "uint8")


def wide_mlp(dtype=torch.float32):
    """Several blocks of codes a matrix, and parameters of less than one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 100), nn.Tanh(), nn.Linear(100, 9)).to(dtype)


def remembered(state_dtype, merge="sum", tasks=2):
    model = wide_mlp()
    mas = MAS(model, 2.0, merge=merge, state_dtype=state_dtype)
    for _ in range(tasks):
        mas.consolidate([X])
        move(model)
    return model, mas


def assert_close_in_root(kept, exact, tolerance):
    """√Ω within a part of the largest √Ω of the tensor, hence of any of its blocks."""
    for name, omega in exact.items():
        omega = omega.float()
        error = (kept[name].float().sqrt() - omega.sqrt()).abs().max()
        assert error <= tolerance * omega.max().sqrt(), (name, float(error))
        assert not kept[name][omega == 0].any(), "zero stays zero"


@pytest.mark.parametrize("state_dtype", NARROW)
@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_merged_importance_is_that_of_float32_but_for_its_rounding(state_dtype, merge):
    tasks = 4
    _, exact = remembered("float32", merge, tasks)
    _, narrow = remembered(state_dtype, merge, tasks)
    assert_close_in_root(narrow.importance, exact.importance, tasks / 250)


def merged(state_dtype, merge, stream):
    """Ω after tasks whose Ω are ``stream``, in the state's dtype and in float64."""
    narrow, exact = ImportanceState(state_dtype), ImportanceState()
    for omega in stream:
        for state, dtype in ((narrow, torch.float32), (exact, torch.float64)):
            task = TaskAccumulator({"w": omega.to(dtype)}, {"w": 1})
            state.end_task({"w": torch.zeros_like(omega, dtype=dtype)}, task, merge)
    return narrow.importance["w"].double(), exact.importance["w"]


def spread():
    """Ω over several orders of magnitude, as in a layer."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, BLOCK, generator=generator).mul(1.5).exp()


STREAMS = {  # the part of the stream that is over, and a number of the task → the factor of Ω
    "the same again": lambda part, task: 1.0,
    "a change": lambda part, task: 1.0 if part < 0.5 else 3.0,
    "varying": lambda part, task: 1 + task * 0.618 % 1,
}


def stream_of(name, tasks):
    omega = spread()
    return (omega * STREAMS[name](task / tasks, task) for task in range(tasks))


@pytest.mark.slow
@pytest.mark.parametrize("merge", ["sum", ("ema", 0.999)], ids=str)
@pytest.mark.parametrize("state_dtype", NARROW)
def test_merging_stays_right_over_ten_thousand_tasks(state_dtype, merge):
    kept, exact = merged(state_dtype, merge, stream_of("varying", 10_000))
    assert abs(float(kept.sum() / exact.sum()) - 1) < 0.005


@pytest.mark.parametrize("tasks", [1, 10, 400])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("merge", ["sum", "mean", "max", ("ema", 0.999)], ids=str)
@pytest.mark.parametrize("state_dtype", NARROW)
def test_merging_stays_right_over_a_long_stream(state_dtype, merge, stream, tasks):
    kept, exact = merged(state_dtype, merge, stream_of(stream, tasks))
    assert abs(float(kept.sum() / exact.sum()) - 1) < 0.005
    error = (kept - exact).abs()
    if state_dtype == "bfloat16":
        assert (error <= (0.2 if stream == "varying" else 0.03) * exact).all()
    else:
        largest = exact.amax(1, keepdim=True)
        assert (error.sqrt() <= 0.1 * largest.sqrt()).all()


def test_rounding_is_unbiased_and_the_same_however_a_tensor_is_sharded():
    omega = spread()
    thresholds = rounding_thresholds(omega, 7)
    assert torch.equal(rounding_thresholds(omega[5:9, ::2], 7), thresholds[5:9, ::2])
    assert float(thresholds.min()) >= 0
    assert float(thresholds.max()) < 1
    block_step = omega.amax(1, keepdim=True).sqrt() / 255
    for rounded, step in (
        (lambda u: round_to_bfloat16(omega, u), omega * 2**-7),
        (lambda u: coded(omega, u), (2 * omega.sqrt() + block_step) * block_step),
    ):
        counters = range(1, 257)
        mean = sum(rounded(rounding_thresholds(omega, n)).double() for n in counters) / 256
        assert ((mean - omega).abs() <= 0.02 * step).all()


def coded(omega, thresholds):
    codes = torch.empty_like(omega, dtype=torch.uint8)
    scales = torch.empty(num_scales(omega.numel()))
    quantize_(codes, scales, omega, thresholds)
    return dequantize(codes, scales)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_penalty_gradient_and_step_are_exact_for_the_importance_that_is_shown(state_dtype):
    model, mas = remembered(state_dtype)
    params = dict(model.named_parameters())
    delta = {name: p.detach().double() - mas.anchor[name].double() for name, p in params.items()}
    omega = {name: mas.importance[name].double() for name in params}
    expected = sum((omega[name] * delta[name] ** 2).sum() for name in params)  # λ/2 = 1
    torch.testing.assert_close(mas.penalty().double(), expected, rtol=1e-5, atol=0)
    mas.penalty().backward()
    by_autograd = {name: p.grad.clone() for name, p in params.items()}
    model.zero_grad()
    torch.testing.assert_close(mas.add_penalty_grad_().double(), expected, rtol=1e-5, atol=0)
    for name, p in params.items():
        torch.testing.assert_close(p.grad.double(), 2 * omega[name] * delta[name])
        torch.testing.assert_close(p.grad, by_autograd[name])
    mas.proximal_step_(0.5)
    for name, p in params.items():
        moved = mas.anchor[name].double() + delta[name] / (1 + omega[name])
        torch.testing.assert_close(p.detach().double(), moved)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_a_saved_state_continues_to_the_same_bits(state_dtype, tmp_path):
    model, first = remembered(state_dtype, "sum_of_sums")
    first.update_importance([X[:3]])
    first.save(tmp_path / "mas")
    second = MAS(model, state_dtype=state_dtype)
    second.load(tmp_path / "mas")
    assert_states_equal(second.state_dict(), first.state_dict())
    for mas in (first, second):
        mas.update_importance([X[3:]])
        mas.consolidate()
    assert_states_equal(second.state_dict(), first.state_dict())
    assert torch.equal(first.penalty(), second.penalty())


def test_codes_of_a_channels_last_model_survive_a_file(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten())
    model.to(memory_format=torch.channels_last)
    mas = MAS(model, state_dtype="uint8")
    mas.consolidate([torch.randn(4, 3, 6, 6)])
    assert not mas.anchor["0.weight"].is_contiguous()
    mas.save(tmp_path / "mas")
    other = MAS(model, state_dtype="uint8")
    other.load(tmp_path / "mas")
    assert_states_equal(other.state_dict(), mas.state_dict())
    plain = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Flatten())
    third = MAS(plain, state_dtype="uint8")
    third.load(tmp_path / "mas")
    assert_close_in_root(third.importance, dict(mas.importance), 1 / 250)
    assert third.anchor["0.weight"].is_contiguous()


@pytest.mark.parametrize("kept", ["float32", *NARROW])
@pytest.mark.parametrize("wanted", ["float32", *NARROW])
def test_a_state_is_converted_to_what_the_new_one_keeps(kept, wanted, tmp_path):
    model, mas = remembered(kept)
    mas.save(tmp_path / "mas")
    other = MAS(model, state_dtype=wanted)
    other.load(tmp_path / "mas")
    assert other.state_dtype == wanted
    assert_close_in_root(other.importance, dict(mas.importance), 1 / 250)
    assert torch.equal(other.anchor["0.weight"], mas.anchor["0.weight"])


def test_damaged_codes_are_refused_and_change_nothing():
    _, mas = remembered("uint8")
    before = mas.state_dict()
    for damage in (
        lambda state: state["importance_scales"].pop("0.weight"),
        lambda state: state["importance_scales"].update({"0.weight": torch.ones(2)}),
        lambda state: state["importance"].update({"0.weight": torch.ones(100, 6)}),
    ):
        state = mas._state.to_dict()
        damage(state)
        with pytest.raises(ValueError, match=r"damaged.*importance_scales"):
            mas.load_state_dict(state)
        assert_states_equal(mas.state_dict(), before)


@pytest.mark.parametrize("state_dtype", NARROW)
def test_growth_keeps_what_is_known(state_dtype):
    model, mas = remembered(state_dtype)
    known = mas.importance["2.weight"].clone()
    model[2] = nn.Linear(100, 12)
    model(X).sum().backward()
    mas.add_penalty_grad_()
    grown = mas.importance["2.weight"]
    assert_close_in_root({"w": grown[:9]}, {"w": known.float()}, 1 / 250)
    assert not grown[9:].any()


@pytest.mark.parametrize("state_dtype", NARROW)
def test_float64_parameters_keep_a_float64_importance(state_dtype):
    model = mlp()
    mas = MAS(model, state_dtype=state_dtype)
    data = [vectors()]
    mas.consolidate(data)
    exact = estimate_importance(model, data)
    for name, omega in mas.importance.items():
        assert torch.equal(omega, exact[name])


def bytes_of(mas):
    """Of what a consolidated MAS holds, by its own state."""
    state = mas._state.to_dict()
    groups = ("importance", "importance_scales", "anchor", "earlier", "earlier_scales")
    return sum(t.nbytes for group in groups for t in state[group].values())


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "expected"),
    [
        (torch.float32, "float32", 8.0),
        (torch.bfloat16, "bfloat16", 4.0),
        (torch.bfloat16, "uint8", 3 + 4 / BLOCK),
    ],
    ids=str,
)
def test_bytes_of_state_per_parameter(dtype, state_dtype, expected):
    model = nn.Linear(512, 256, bias=False, dtype=dtype)
    mas = MAS(model, state_dtype=state_dtype)
    mas.consolidate([torch.randn(2, 512, dtype=dtype)])
    assert bytes_of(mas) / (512 * 256) == expected


class LargestNew(TorchDispatchMode):
    """The most elements that any operation inside gave anew."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage.data_ptr() not in given:
                self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("state_dtype", ["float32", *NARROW])
def test_merging_never_holds_a_second_importance_of_a_whole_parameter(state_dtype):
    p = torch.randn(3 * _PIECE + 5, dtype=torch.bfloat16)
    memory = ImportanceState(state_dtype)
    memory.make_room({"w": p})
    before = memory.importance["w"].clone()
    task = TaskAccumulator({"w": torch.rand(p.shape)}, {"w": 4})
    with LargestNew() as largest:
        memory.end_task({"w": p}, task, "sum")
    assert 0 < largest.elements <= _PIECE
    assert_close_in_root(memory.importance, {"w": before.float() + task.sums["w"] / 4}, 1 / 250)


def test_parts_of_what_is_kept_are_read_and_written_alone():
    kept = StoredImportance({"w": torch.empty(1000)}, "uint8")
    kept.put("w", torch.rand(1000))
    before = kept["w"]
    part = slice(256, 600)
    kept.write("w", part, kept.read("w", part) * 2)
    assert torch.equal(kept["w"][:256], before[:256])
    assert torch.equal(kept["w"][256:512], 2 * before[256:512])
    assert torch.equal(kept["w"][768:], before[768:])
    assert num_scales(1000) == kept.stored("w")[1].numel() == 4
