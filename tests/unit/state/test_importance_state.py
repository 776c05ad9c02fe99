"""How Ω and θ* are laid out, how tasks merge, and what happens to parameters that grow.

The model multiplies its input by its parameters, and the objective is the output's sum: a sample's
Ω is then its absolute value.
"""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from mas_ext import MAS
from mas_ext._state.merging import POLICIES
from mas_ext._state.task_accumulator import TaskAccumulator
from mas_ext._storage.flat_tensors import ALIGNMENT, FlatTensors
from mas_ext.reference import accumulation_dtype
from tests.support.regularizers import assert_refused, refusal


class Scale(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.grow(**sizes)

    def grow(self, **sizes):
        for name, size in sizes.items():
            setattr(self, name, nn.Parameter(torch.arange(1.0, size + 1)))

    def forward(self, x):
        parts = [x[:, : len(p)] * p for p in self.parameters()]
        return torch.cat(parts, 1)


def task(*samples):
    return [torch.tensor(samples, dtype=torch.float32)]


def measure(mas, *samples, ends=True):
    how = mas.consolidate if ends else mas.update_importance
    how(task(*samples), objective=lambda output: output.sum(1))


# -- Merging: a new policy is a new row ------------------------------------------------------------
TASKS = [[1.0, 4.0], [3.0, 0.0], [2.0, 2.0]]
MERGED = {
    "sum": [6.0, 6.0],
    "mean": [2.0, 2.0],
    "max": [3.0, 4.0],
    ("ema", 0.5): [2.0, 2.0],  # ((1+3)/2 + 2)/2, ((4+0)/2 + 2)/2
    ("ema_from_zero", 0.5): [1 / 8 + 3 / 4 + 2 / 2, 4 / 8 + 2 / 2],
    ("decay", 0.5): [1 / 4 + 3 / 2 + 2, 4 / 4 + 2],
    ("decay", 0): [2.0, 2.0],
    "sum_of_sums": [2 * 1.0 + 3 + 2, 2 * 4.0 + 0 + 2],
    ("ema", 0.25): [0.25 * (0.25 * 1 + 0.75 * 3) + 0.75 * 2, 0.25 * (0.25 * 4) + 0.75 * 2],
}


def test_every_policy_has_a_row():
    assert {merge if isinstance(merge, str) else merge[0] for merge in MERGED} == set(POLICIES)


@pytest.mark.parametrize("merge", MERGED, ids=str)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "uint8"])
def test_merge(merge, state_dtype):
    model = Scale(w=2)
    mas = MAS(model, merge=merge, state_dtype=state_dtype)
    for number, sample in enumerate(TASKS):
        with torch.no_grad():
            model.w.add_(number)
        measure(mas, sample)
        torch.testing.assert_close(mas.anchor["w"], model.w.detach())
    tolerance = {"float32": 1e-6, "bfloat16": 2**-6, "uint8": 2**-5}[state_dtype]
    expected = torch.tensor(MERGED[merge])
    torch.testing.assert_close(mas.importance["w"].float(), expected, rtol=tolerance, atol=1e-3)
    assert bool(mas.state_dict()["earlier"]) == (merge == "sum_of_sums")


BAD_MERGES = {
    "median": "'sum_of_sums'",
    ("ema",): "'sum'",
    ("ema", 1.0): "[0, 1)",
    ("ema", 1.5): "[0, 1)",
    ("ema", -0.1): "[0, 1)",
    ("ema_from_zero", 2): "[0, 1)",
    ("decay", 1): "[0, 1)",
    ("decay", -0.5): "[0, 1)",
    "decay": "('decay', alpha)",
    None: "'sum'",
    3: "'sum'",
}


@pytest.mark.parametrize("merge", BAD_MERGES, ids=str)
def test_unknown_merges_are_refused(merge):
    create = refusal(lambda: MAS(Scale(w=1), merge=merge), ValueError, "merge", BAD_MERGES[merge])
    assert_refused(create)


def test_sum_of_sums_doubles_the_weight_of_every_old_task_with_each_new_one():
    mas = MAS(Scale(w=1), merge="sum_of_sums")
    for number in range(5):  # a digit for each task
        measure(mas, [10.0**number])
    assert mas.importance["w"].item() == 11248


# -- Parameters that come, rest and grow -----------------------------------------------------------
def test_sum_of_sums_follows_growth_and_new_parameters():
    model = Scale(w=1)
    mas = MAS(model, merge="sum_of_sums")
    measure(mas, [1.0])
    model.grow(v=1)
    measure(mas, [1.0, 1.0], ends=False)
    model.grow(w=2)
    mas.consolidate()
    measure(mas, [1.0, 1.0])
    assert mas.importance["w"].tolist() == [4.0, 1.0]
    assert mas.importance["v"].tolist() == [2.0]
    model.grow(w=3)
    mas.penalty()
    assert mas.state_dict()["earlier"]["w"].tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("state_dtype", ["float32", "uint8"])
def test_growth_keeps_what_is_known_and_starts_the_rest_at_zero(state_dtype):
    model = Scale(w=2)
    mas = MAS(model, state_dtype=state_dtype)
    measure(mas, [1.0, 2.0])
    with torch.no_grad():
        model.w = nn.Parameter(torch.full((3,), 9.0))
    mas.penalty()
    torch.testing.assert_close(
        mas.importance["w"], torch.tensor([1.0, 2.0, 0.0]), rtol=0.01, atol=0
    )
    assert mas.anchor["w"].tolist() == [1.0, 2.0, 9.0]


@pytest.mark.parametrize("shape", [(1,), (2, 1), (0,)], ids=str)
def test_shrinking_is_refused_and_changes_nothing(shape):
    model = Scale(w=2, v=1)
    mas = MAS(model)
    measure(mas, [1.0, 2.0])
    model.w = nn.Parameter(torch.ones(shape))
    assert_refused(refusal(mas.penalty, ValueError, "'w'", "[2]", "new MAS", "params="))
    assert mas.anchor["w"].tolist() == [1.0, 2.0]


def test_what_is_not_measured_in_a_task_keeps_its_importance():
    model = Scale(w=1, v=1)
    mas = MAS(model, merge="mean")
    model.v.requires_grad_(False)
    measure(mas, [1.0])
    model.w.requires_grad_(False)
    model.v.requires_grad_(True)
    measure(mas, [2.0])
    assert {n: t.item() for n, t in mas.importance.items()} == {"w": 1.0, "v": 2.0}
    model.w.requires_grad_(True)
    measure(mas, [4.0])
    assert {n: t.item() for n, t in mas.importance.items()} == {"w": 2.5, "v": 3.0}


def test_an_open_task_counts_samples_for_each_parameter_and_follows_growth():
    model = Scale(w=1, v=1)
    mas = MAS(model)
    model.v.requires_grad_(False)
    measure(mas, [1.0], [3.0], ends=False)
    assert set(mas.state_dict()["open"]) == {"w"}
    model.v.requires_grad_(True)
    model.grow(w=2)
    before = mas.state_dict()
    measure(mas, [2.0, 4.0], ends=False)
    assert before["open"]["w"].tolist() == [4.0], "the state stayed as it was"
    measure(mas, [6.0, 8.0])
    assert mas.importance["w"].tolist() == [12 / 4, 12 / 4]
    assert mas.importance["v"].tolist() == [8 / 2]
    assert not mas.state_dict()["open"]


def test_what_has_no_samples_yet_has_no_importance():
    task = TaskAccumulator().with_room_for({"w": torch.zeros(1)})
    assert list(task.sums) == ["w"]
    assert not task.measured_sums()


# -- Flat tensors ----------------------------------------------------------------------------------
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(shapes=SHAPES, dtype=DTYPES)
def test_flat_tensors_are_aligned_zero_and_do_not_overlap(shapes, dtype):
    like = {str(i): torch.ones(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    flat = FlatTensors(like)
    for i, (name, view) in enumerate(flat.items()):
        assert view.shape == like[name].shape
        assert view.dtype == dtype
        assert view.data_ptr() % ALIGNMENT == 0
        assert not view.any()
        view.fill_(i + 1)
    assert all((view == i + 1).all() for i, view in enumerate(flat.values()))
    assert len({view.untyped_storage().data_ptr() for view in flat.values() if view.numel()}) <= 1


def test_flat_tensors_keep_strides_where_they_are_dense_and_take_a_dtype_for_each():
    like = {
        "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.zeros(3, 4, dtype=torch.bfloat16).t(),
        "sliced": torch.zeros(4, 8).double()[:, ::2],
    }
    with torch.inference_mode():
        flat = FlatTensors(like, accumulation_dtype)
    assert flat["channels_last"].stride() == like["channels_last"].stride()
    assert flat["transposed"].stride() == like["transposed"].stride()
    assert flat["sliced"].is_contiguous()
    assert [t.dtype for t in flat.values()] == [torch.float32, torch.float32, torch.float64]
    assert list(flat) == list(like)
    assert not any(t.is_inference() for t in flat.values())


def _is_advised(address: int) -> bool:
    """Whether the memory at an address has Linux's flag for huge pages on request."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError(hex(address))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_large_state_asks_for_huge_pages():
    flat = FlatTensors({"w": torch.empty(3 * 2**20)})
    assert _is_advised(flat["w"].data_ptr() + flat["w"].nbytes // 2)
    assert not flat["w"].any()


def test_state_without_memory_asks_for_nothing():
    assert FlatTensors({"w": torch.empty(2**22, device="meta")})["w"].is_meta
    with FakeTensorMode():
        assert FlatTensors({"w": torch.empty(2**22)})["w"].shape == (2**22,)
