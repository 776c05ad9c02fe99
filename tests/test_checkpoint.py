"""Saving and loading: the same bits, or a clear refusal that changes nothing."""

import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from mas_ext import MAS
from mas_ext._state import checkpoint
from mas_ext._state.distributed_checkpoint import unpacked
from tests.models import mlp, vectors
from tests.test_regularizer import assert_states_equal, move

X = vectors(dtype=torch.float32)


def used(model=None):
    """Two tasks, and a third that is open."""
    model = model or mlp(torch.float32)
    mas = MAS(model, 3.0, merge=("ema", 0.25))
    for _ in range(2):
        mas.consolidate([X])
        move(model)
    mas.update_importance([X[:3]])
    return mas


def test_a_saved_state_continues_to_the_same_bits(tmp_path):
    model = mlp(torch.float32)
    first = used(model)
    first.save(tmp_path / "mas.safetensors")
    second = MAS(model)
    second.load(tmp_path / "mas.safetensors")
    assert_states_equal(second.state_dict(), first.state_dict())
    assert second.lambda_reg == 3.0
    for mas in (first, second):
        mas.update_importance([X[3:]])
        mas.consolidate()
    assert_states_equal(second.state_dict(), first.state_dict())
    assert torch.equal(first.penalty(), second.penalty())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_survives(tmp_path, dtype):
    model = mlp(dtype)
    mas = MAS(model)
    mas.consolidate([X.to(dtype)])
    mas.save(tmp_path / "mas")
    other = MAS(model)
    other.load(str(tmp_path / "mas"))
    assert_states_equal(other.state_dict(), mas.state_dict())


def test_an_empty_state_survives(tmp_path):
    mas = MAS(mlp())
    mas.save(tmp_path / "mas")
    mas.load(tmp_path / "mas")
    assert mas.num_tasks == 0
    assert mas.penalty() == 0


def test_a_state_dict_is_a_copy():
    mas = used()
    state = mas.state_dict()
    omega = state["importance"]["0.weight"].clone()
    mas.consolidate([X])
    assert torch.equal(state["importance"]["0.weight"], omega)


def test_a_state_dict_survives_torch_save_with_weights_only(tmp_path):
    mas = used()
    torch.save(mas.state_dict(), tmp_path / "state.pt")
    other = MAS(mlp(torch.float32))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_states_equal(other.state_dict(), mas.state_dict())


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "mas"
    mas = used()
    mas.save(path)
    before = path.read_bytes()

    def crash(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", crash)
    mas.consolidate([X])
    with pytest.raises(OSError, match="no space left"):
        mas.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["mas"], "no temporary file is left"


def refused(path, match, error=ValueError, model=None, **options):
    """Loading fails with that message and leaves the state as it was."""
    mas = used(model)
    before = mas.state_dict()
    with pytest.raises(error, match=match):
        mas.load(path, **options)
    assert_states_equal(mas.state_dict(), before)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "mas"
    used().save(path)
    return path


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content))])
    refused(saved, "truncated, corrupted")


def test_every_flipped_bit_is_noticed(saved):
    """In the payload, in the metadata and in the header, at regular steps through the file."""
    content = saved.read_bytes()
    mas = used()
    before = mas.state_dict()
    for position in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        saved.write_bytes(bytes(flipped))
        with pytest.raises(ValueError, match=r"corrupted|no mas_ext state|newer mas_ext|not a mas"):
            mas.load(saved)
    assert_states_equal(mas.state_dict(), before)


def test_a_file_of_the_future_is_refused(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 5)
    used().save(saved)
    monkeypatch.undo()
    refused(saved, "format version 5 and this mas_ext reads up to 4; install a newer")


# What a later version of the format has and this one had not.
ADDED = {3: {"drift", "energy", "seen"}}
ADDED[2] = ADDED[3] | {"importance_scales", "earlier_scales"}
ADDED[1] = ADDED[2] | {"weighting", "earlier"}


# What none of them can know.
UNKNOWN = {
    "energy": {"mean": 0.0, "tasks": 0},
    "seen": {"samples": 0, "weight": 0, "energy": 0.0},
}


def as_of(version, state):
    older = {k: v for k, v in state.items() if k not in ADDED[version]}
    return {**older, "version": version}


@pytest.mark.parametrize("version", ADDED)
def test_a_state_of_an_older_version_is_read(version, tmp_path, monkeypatch):
    mas = used()
    new = MAS(mlp(torch.float32))
    new.load_state_dict(as_of(version, unpacked(mas.state_dict())))
    expected = {**unpacked(mas.state_dict()), **UNKNOWN}
    assert_states_equal(new.state_dict(), expected)
    for name in ("SCALES", "TENSORS"):  # what write() knows of
        left = [group for group in getattr(checkpoint, name) if group not in ADDED[version]]
        kept = left if name == "TENSORS" else {}
        monkeypatch.setattr(checkpoint, name, kept)
    checkpoint.write(as_of(version, unpacked(mas.state_dict())), tmp_path / "old")
    monkeypatch.undo()
    new.load(tmp_path / "old")
    assert_states_equal(new.state_dict(), expected)
    new.consolidate()  # the open task's energy is not known, and does not count
    assert unpacked(new.state_dict())["energy"] == UNKNOWN["energy"]


def test_sums_of_sums_and_of_batches_continue_to_the_same_bits(tmp_path):
    how = {"estimator": "batch", "weighting": "batches"}
    model = mlp(torch.float32)
    first = MAS(model, merge="sum_of_sums")
    for _ in range(3):
        first.consolidate(X.split(4), **how)
        move(model)
    first.update_importance(X[:6].split(4), **how)
    first.save(tmp_path / "mas")
    second = MAS(model)
    second.load(tmp_path / "mas")
    for mas in (first, second):
        mas.update_importance([X[6:]], **how)
        mas.consolidate()
        mas.consolidate([X])
    assert_states_equal(second.state_dict(), first.state_dict())
    assert (second.state_dict()["earlier"]["0.weight"] > 0).any()


def test_other_files_are_refused(tmp_path):
    refused(tmp_path / "missing", "does not exist", FileNotFoundError)
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "cannot be read")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "weights")
    refused(tmp_path / "weights", "no mas_ext state")
    metadata = {"state": json.dumps({"format": "other"})}
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "other", metadata)
    refused(tmp_path / "other", "not a mas_ext state")


def test_another_models_state_is_refused(saved):
    torch.manual_seed(0)
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    refused(saved, r"'0.bias' has shape \[9\] in this model and \[8\]", model=wider)
    shorter = nn.Sequential(nn.Linear(6, 8))
    refused(saved, "has parameter '2.bias', which this model lacks", model=shorter)
    longer = mlp(torch.float32).append(nn.Linear(4, 4))
    refused(saved, r"lacks parameter '3.weight' \(2 in all\).*strict=False", model=longer)


def test_new_parameters_may_join_when_not_strict(saved):
    mas = MAS(mlp(torch.float32).append(nn.Linear(4, 4)))
    mas.load(saved, strict=False)
    assert "3.weight" not in mas.importance
    mas.consolidate([X])
    assert "3.weight" in mas.importance


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_tasks", None),
        ("tasks", {}),
        ("num_samples", {}),
        ("importance", {}),
        ("anchor", None),
        ("open", 3),
        ("weighting", None),
        ("weighting", "tasks"),
        ("earlier", None),
        ("earlier", {"0.weight": torch.zeros(8, 6)}),
        ("merge", "median"),
        ("lambda_reg", -1.0),
        ("lambda_reg", None),
    ],
)
def test_a_damaged_state_dict_is_refused(key, value):
    mas = used()
    before = mas.state_dict()
    damaged = {**unpacked(mas.state_dict()), "lambda_reg": 77.0, key: value}
    if value is None:
        del damaged[key]
    with pytest.raises(ValueError, match=r"damaged|merge|lambda_reg|weighting"):
        mas.load_state_dict(damaged)
    assert_states_equal(mas.state_dict(), before)


def test_a_parameter_that_was_renamed_may_be_left_out():
    model = mlp(torch.float32)
    mas = used(model)
    state = mas.state_dict()
    nn.utils.parametrizations.weight_norm(model[0])
    mas = MAS(model)
    with pytest.raises(ValueError, match=r"'0.weight', which this model lacks; pass strict=False"):
        mas.load_state_dict(state)
    mas.load_state_dict(state, strict=False)
    assert set(mas.anchor) == {"0.bias", "2.weight", "2.bias"}


def test_saving_respects_the_umask_and_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    used().save(tmp_path / "link")
    (tmp_path / "plain").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_state_dict_that_is_none_is_refused():
    mas = used()
    for state in ({}, {"format": "mas_ext", "version": "1"}, None, mas.state_dict()["importance"]):
        with pytest.raises(ValueError, match="mas_ext"):
            mas.load_state_dict(state)
