"""Flat buffers, merging, growth."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from mas_ext._state.flat_tensors import ALIGNMENT, FlatTensors
from mas_ext._state.importance_state import Memory, OpenTask, check_merge, merge_
from mas_ext.importance.sample_statistics import Seen
from mas_ext.reference import accumulation_dtype

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


def test_flat_tensors_keep_the_strides_of_dense_tensors():
    like = {
        "channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.zeros(3, 4).t(),
        "sliced": torch.zeros(4, 8)[:, ::2],
    }
    flat = FlatTensors(like)
    assert flat["channels_last"].stride() == like["channels_last"].stride()
    assert flat["transposed"].stride() == like["transposed"].stride()
    assert flat["sliced"].is_contiguous()


def test_flat_tensors_hold_mixed_dtypes_in_the_accumulation_dtype():
    like = {"low": torch.zeros(3, dtype=torch.bfloat16), "wide": torch.zeros(3).double()}
    flat = FlatTensors(like, accumulation_dtype)
    assert flat["low"].dtype == torch.float32
    assert flat["wide"].dtype == torch.float64
    assert list(flat) == ["low", "wide"]


TASKS = [torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0]), torch.tensor([2.0, 2.0])]
MERGED = {
    "sum": [6.0, 6.0],
    "mean": [2.0, 2.0],
    "max": [3.0, 4.0],
    ("ema", 0.5): [2.0, 2.0],  # ((1+3)/2 + 2)/2, ((4+0)/2 + 2)/2
    ("ema_from_zero", 0.5): [1 / 8 + 3 / 4 + 2 / 2, 4 / 8 + 2 / 2],
    "sum_of_sums": [2 * 1.0 + 3 + 2, 2 * 4.0 + 0 + 2],
    ("ema", 0.25): [0.25 * (0.25 * 1 + 0.75 * 3) + 0.75 * 2, 0.25 * (0.25 * 4) + 0.75 * 2],
}


@pytest.mark.parametrize("merge", MERGED, ids=str)
def test_merge(merge):
    omega, earlier = torch.zeros(2), torch.zeros(2)
    for task, new in enumerate(TASKS):
        merge_(omega, new, task, check_merge(merge), earlier)
    torch.testing.assert_close(omega, torch.tensor(MERGED[merge]))


def measured(omega):
    """An open task of one sample, whose sums are then its Ω."""
    return OpenTask(omega, dict.fromkeys(omega, 1))


def test_sum_of_sums_doubles_the_weight_of_every_old_task_with_each_new_one():
    memory = Memory()
    for task in range(5):  # a digit a task
        p = torch.zeros(1, dtype=torch.float64)
        memory.end_task({"w": p}, measured({"w": p + 10**task}), "sum_of_sums")
    assert memory.importance["w"].item() == 11248


def test_sum_of_sums_follows_growth_and_new_parameters():
    memory, one = Memory(), torch.ones(1)
    memory.end_task({"w": one}, measured({"w": one}), "sum_of_sums")
    memory.end_task(
        {"w": torch.ones(2), "v": one}, measured({"w": torch.ones(1), "v": one}), "sum_of_sums"
    )
    memory.end_task(
        {"w": torch.ones(2), "v": one}, measured({"w": torch.ones(2), "v": one}), "sum_of_sums"
    )
    assert memory.importance["w"].tolist() == [4.0, 1.0]
    assert memory.importance["v"].tolist() == [2.0]
    memory.fit({"w": torch.ones(3), "v": one})
    assert memory.earlier["w"].tolist() == [3.0, 0.0, 0.0]


@pytest.mark.parametrize("merge", ["sum", ("ema_from_zero", 0.5)], ids=str)
def test_other_merges_need_no_memory_of_their_own(merge):
    memory = Memory()
    memory.end_task({"w": torch.ones(2)}, measured({"w": torch.ones(2)}), merge)
    assert not memory.earlier


BAD_MERGES = ["median", ("ema",), ("ema", 1.0), ("ema", -0.1), ("ema_from_zero", 2), None, 3]


@pytest.mark.parametrize("merge", BAD_MERGES, ids=str)
def test_unknown_merge_is_refused(merge):
    with pytest.raises(ValueError, match="merge"):
        check_merge(merge)


def remembered():
    memory = Memory()
    p = torch.arange(6.0).view(2, 3)
    memory.end_task({"w": p}, measured({"w": p + 1}), "sum")
    return memory, p


def test_growth_keeps_what_is_known_and_starts_the_rest_at_zero():
    memory, p = remembered()
    grown = torch.full((4, 3), 9.0)
    memory.fit({"w": grown})
    assert torch.equal(memory.importance["w"][:2], p + 1)
    assert not memory.importance["w"][2:].any()
    assert torch.equal(memory.anchor["w"][:2], p)
    assert torch.equal(memory.anchor["w"][2:], grown[2:])


@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 1), (6,)])
def test_shrinking_is_refused_and_changes_nothing(shape):
    memory, p = remembered()
    with pytest.raises(ValueError, match=r"'w' had shape \[2, 3\].*start a new MAS"):
        memory.fit({"new": torch.zeros(1), "w": torch.zeros(shape)})
    assert torch.equal(memory.anchor["w"], p)
    assert list(memory.anchor) == ["w"]


def test_a_change_of_dtype_is_followed():
    memory, p = remembered()
    memory.fit({"w": p.double()})
    assert memory.anchor["w"].dtype == memory.importance["w"].dtype == torch.float64
    assert torch.equal(memory.importance["w"], (p + 1).double())


def test_what_is_not_measured_in_a_task_keeps_its_importance():
    memory, p = remembered()
    memory.end_task({"w": p, "v": p}, measured({"v": 2 * p}), "mean")
    assert torch.equal(memory.importance["w"], p + 1)
    assert torch.equal(memory.importance["v"], 2 * p)
    assert memory.tasks == {"w": 1, "v": 1}


def test_open_task_adds_up_and_follows_growth():
    first = OpenTask().opened({"w": torch.zeros(2)})
    first.sums["w"].fill_(3.0)
    first.count(["w"], Seen(2, 1, 3.0))
    both = first.opened({"w": torch.zeros(3)})
    both.sums["w"].add_(1.0)
    both.count(["w"], Seen(3, 3, 4.0))
    assert both.counts == {"w": 4}
    assert both.seen == Seen(5, 4, 7.0)
    assert torch.equal(both.sums["w"], torch.tensor([4.0, 4.0, 1.0]))
    assert torch.equal(first.sums["w"], torch.tensor([3.0, 3.0])), "the first stayed as it was"
    assert first.counts == {"w": 1}


def test_open_task_counts_samples_a_parameter():
    task = OpenTask().opened({"w": torch.zeros(1)})
    task.count(["w"], Seen(3, 3))
    task = task.opened({"w": torch.zeros(1), "thawed": torch.zeros(1)})
    assert set(task.counted()) == {"w"}, "what has no samples yet has no importance"
    task.sums["thawed"].fill_(2.0)
    task.count(["w", "thawed"], Seen(2, 2))
    assert task.counts == {"w": 5, "thawed": 2}
    memory = Memory()
    memory.end_task(dict(task.sums), task, "sum")
    assert memory.importance["thawed"] == 1.0


def test_flat_tensors_made_in_inference_mode_are_ordinary():
    with torch.inference_mode():
        flat = FlatTensors({"w": torch.zeros(3)})
    assert not flat["w"].is_inference()


# -- huge pages ------------------------------------------------------------------------------------


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
