"""Saving and loading: the same bits, or a refusal that changes nothing."""

import json
import math
import os

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from mas_ext import MAS
from mas_ext._state import checkpoint
from mas_ext._storage import tensor_file
from mas_ext._storage.atomic_write import replacing
from tests.support.mutated import NESTED, File
from tests.support.regularizers import (
    assert_refused,
    assert_states_equal,
    learned,
    move,
    plain_state,
    refusal,
)
from tests.support.zoo.small import assert_same, mlp, vectors

X = vectors(dtype=torch.float32)


def used(model=None, **options):
    """Two tasks, and a third that is open."""
    model = model or mlp(torch.float32)
    x = X.to(next(model.parameters()).dtype)
    mas = MAS(model, 3.0, **{"merge": ("ema", 0.25), **options})
    for _ in range(2):
        mas.consolidate([x])
        move(model)
    mas.update_importance([x[:3]])
    return mas


BY_BATCHES = {"estimator": "batch", "weighting": "batches"}


@pytest.mark.parametrize("how", [{}, BY_BATCHES], ids=str)
@pytest.mark.parametrize("merge", [("ema", 0.25), "sum_of_sums"], ids=str)
def test_a_saved_state_continues_to_the_same_bits(tmp_path, merge, how):
    model = mlp(torch.float32)
    first = MAS(model, 3.0, merge=merge)
    for _ in range(3):
        first.consolidate(X.split(4), **how)
        move(model)
    first.update_importance(X[:6].split(4), **how)
    first.save(tmp_path / "mas.safetensors")
    second = MAS(model)
    second.load(str(tmp_path / "mas.safetensors"))
    assert_states_equal(second.state_dict(), first.state_dict())
    assert (second.lambda_reg, second.num_tasks) == (3.0, 3)
    for mas in (first, second):
        mas.update_importance([X[6:]], **how)
        mas.consolidate()
        mas.consolidate([X])
    assert_states_equal(second.state_dict(), first.state_dict())
    assert torch.equal(first.penalty(), second.penalty())
    assert bool(plain_state(second)["earlier"]) == (merge == "sum_of_sums")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_survives(tmp_path, dtype):
    mas = used(mlp(dtype))
    mas.save(tmp_path / "mas")
    other = MAS(mlp(dtype))
    other.load(tmp_path / "mas")
    assert_states_equal(other.state_dict(), mas.state_dict())


def test_an_empty_state_survives(tmp_path):
    mas = MAS(mlp())
    mas.save(tmp_path / "mas")
    mas.load(tmp_path / "mas")
    assert mas.num_tasks == 0
    assert mas.penalty() == 0


def test_a_state_dict_is_a_copy_that_torch_loads_with_weights_only(tmp_path):
    mas = used()
    state = mas.state_dict()
    omega = state["importance"]["0.weight"].clone()
    torch.save(state, tmp_path / "state.pt")
    other = MAS(mlp(torch.float32))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_states_equal(other.state_dict(), state)
    mas.consolidate([X])
    assert torch.equal(state["importance"]["0.weight"], omega)


def test_a_state_dict_has_room_for_what_is_not_measured():
    """Of a new MAS, whose tensors are as many as those of one that is used."""
    model = mlp(torch.float32)
    state = MAS(model, merge="sum_of_sums").state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert list(state["importance"]) == list(state["anchor"]) == list(state["earlier"]) == names
    assert_same(state["anchor"], dict(model.named_parameters()), 0, 0)
    assert not any(t.any() for t in (state["importance"] | state["earlier"]).values())
    other = MAS(model)
    other.load_state_dict(state)
    assert not other.anchor


# -- Older versions --------------------------------------------------------------------------------
# What a later version of the format has and this one had not.
ADDED = {5: {"reduction"}}
ADDED[4] = ADDED[5] | {"control", "references"}
ADDED[3] = ADDED[4] | {"drift", "energy", "seen"}
ADDED[2] = ADDED[3] | {"importance_scales", "earlier_scales"}
ADDED[1] = ADDED[2] | {"weighting", "earlier"}
# What none of them can know.
UNKNOWN = {
    "energy": {"mean": 0.0, "tasks": 0},
    "seen": {"samples": 0, "weight": 0, "energy": 0.0},
    "control": {},
}


def as_of(version, state):
    older = {k: v for k, v in state.items() if k not in ADDED[version]}
    return {**older, "version": version}


@pytest.mark.parametrize("version", ADDED)
def test_a_state_of_an_older_version_is_read(version, tmp_path, monkeypatch):
    mas = used()
    new = MAS(mlp(torch.float32))
    new.load_state_dict(as_of(version, plain_state(mas)))
    unknown = {key: value for key, value in UNKNOWN.items() if key in ADDED[version]}
    expected = {**plain_state(mas), **unknown}
    assert_states_equal(plain_state(new), expected)
    for name in ("SCALES", "TENSORS"):  # what write() knows of
        left = [group for group in getattr(checkpoint, name) if group not in ADDED[version]]
        kept = left if name == "TENSORS" else {}
        monkeypatch.setattr(checkpoint, name, kept)
    checkpoint.write(as_of(version, plain_state(mas)), tmp_path / "old")
    monkeypatch.undo()
    new.load(tmp_path / "old")
    assert_states_equal(plain_state(new), expected)
    new.consolidate()  # the open task's energy is not known, and does not count
    if "energy" in ADDED[version]:
        assert plain_state(new)["energy"] == UNKNOWN["energy"]


# -- Files -----------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "mas"
    used().save(path)
    return path


def assert_load_refused(path, kind, *words, model=None):
    mas = used(model)
    assert_refused(refusal(lambda: mas.load(path), kind, *words), unchanged=(mas,))


def other_format(path):
    metadata = {"state": json.dumps({"format": "other"})}
    safetensors.torch.save_file({"w": torch.ones(2)}, path, metadata)


def of_the_future(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "VERSION", checkpoint.VERSION + 1)
        used().save(path)


OTHER_FILES = {
    "missing": (lambda path: None, FileNotFoundError, "does not exist"),
    "a folder": (lambda path: path.mkdir(), FileNotFoundError, "not a file"),
    "text": (lambda path: path.write_text("hello"), ValueError, "copy"),
    "no metadata": (
        lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
        ValueError,
        "copy",
    ),
    "another format": (other_format, ValueError, "not a mas_ext state", "save()"),
    "of the future": (of_the_future, ValueError, "version", "newer"),
    "a measurement": (
        lambda path: measurement(path),
        ValueError,
        "not a mas_ext state",
    ),
}


def measurement(path):
    def stop(done):
        if done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        used().update_importance(X.split(1), checkpoint=path, save_every=2, progress=stop)


@pytest.mark.parametrize("case", OTHER_FILES)
def test_other_files_are_refused(case, tmp_path):
    make, kind, *words = OTHER_FILES[case]
    make(tmp_path / "file")
    assert_load_refused(tmp_path / "file", kind, *words)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved, part):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    assert_load_refused(saved, ValueError, "truncated", "copy")


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


# What is wrong although the checksum is right: an attacker can compute it, too.
FORGED = {
    "nested deeply": lambda file: file.settings.update(more=f"{NESTED}100000"),
    "nested": lambda file: file.settings["seen"].update(samples=f"{NESTED}900"),
    "no object": lambda file: setattr(file, "settings", [1]),
    "strides of nothing": lambda file: file.settings.update(strides={"x": [1]}),
    "strides that overlap": lambda file: file.settings.update(
        strides={"importance/0.weight": [1, 1]}
    ),
    "strides out of the memory": lambda file: file.settings.update(
        strides={"importance/0.weight": [10**6, 1]}
    ),
    "strides that are none": lambda file: file.settings.update(strides=3),
    "a tensor of codes": lambda file: vars(file.entries[-1]).update(
        dtype="C64", shape=[0], data=b""
    ),
    "a missing tensor": lambda file: file.entries.pop(0),
    "scales of another shape": lambda file: [
        vars(one).update(shape=[1, *one.shape]) for one in file.entries if "scales" in one.name
    ],
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_file_is_refused(tmp_path, case):
    used(state_dtype="uint8").save(tmp_path / "mas")
    file = File.of((tmp_path / "mas").read_bytes())
    FORGED[case](file)
    (tmp_path / "mas").write_bytes(file.content(is_repaired=True))
    assert_load_refused(tmp_path / "mas", ValueError, "mas'", "copy")


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


def test_saving_respects_the_umask_and_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    used().save(tmp_path / "link")
    (tmp_path / "plain").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_is_being_written_is_not_cleared_away(tmp_path):
    """Two writers at a time: the last one to end wins, and both end."""
    mas, other = used(), used(merge="sum")
    other.save(tmp_path / "other")
    with replacing(tmp_path / "mas") as file:
        mas.save(tmp_path / "mas")
        assert len(os.listdir(tmp_path)) == 3
        file.write((tmp_path / "other").read_bytes())
    mas.load(tmp_path / "mas")
    assert_states_equal(mas.state_dict(), other.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["mas", "other"]


def test_other_files_with_similar_names_stay(tmp_path):
    names = [".mas.partial", ".mas.old", ".other." + 32 * "0" + ".partial", "mas.partial"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / (".mas." + 32 * "0" + ".partial")).touch()
    used().save(tmp_path / "mas")
    assert sorted(os.listdir(tmp_path)) == sorted(["mas", *names])


def test_safetensors_reads_what_is_written(tmp_path):
    """Of every dtype, empty and 0-dim, and each at a place that its dtype can be read from."""
    tensors = {
        f"{n}/{dtype}": (100 * torch.randn(shape, dtype=torch.float64)).to(dtype)
        for n, shape in enumerate([(), (0,), (3,), (2, 0, 3), (5, 1, 2)])
        for dtype in tensor_file.DTYPES
    }
    settings = {"quotes": '"sha256":"' + 64 * "0"}
    tensor_file.write(tmp_path / "file", settings, tensors)
    with safe_open(tmp_path / "file", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        starts = json.loads((tmp_path / "file").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert_states_equal(found, tensors)
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert starts[name]["data_offsets"][0] % tensor.itemsize == 0
    read = tensor_file.read(tmp_path / "file", lambda settings: None)
    assert_states_equal(read, (settings, tensors))


# -- States of other models, damaged states --------------------------------------------------------
def wider():
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def longer():
    return mlp(torch.float32).append(nn.Linear(4, 4))


def renamed():
    model = mlp(torch.float32)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


OTHER_MODELS = {
    "wider": (wider, "'0.bias'", "[9]", "[8]", "before"),
    "shorter": (lambda: nn.Sequential(nn.Linear(6, 8)), "'2.bias'", "strict=False"),
    "longer": (longer, "'3.weight'", "2 in all", "strict=False"),
    "renamed": (renamed, "'0.weight'", "strict=False"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_another_models_state_is_refused(saved, case):
    make, *words = OTHER_MODELS[case]
    assert_load_refused(saved, ValueError, *words, model=make())


def test_when_not_strict_parameters_may_join_and_be_left_out(saved):
    mas = MAS(longer())
    mas.load(saved, strict=False)
    assert "3.weight" not in mas.importance
    mas.consolidate([X])
    assert "3.weight" in mas.importance
    mas = MAS(renamed())
    mas.load(saved, strict=False)
    assert set(mas.anchor) == {"0.bias", "2.weight", "2.bias"}


def test_a_state_of_which_nothing_fits_is_refused_even_when_not_strict(saved):
    mas = MAS(nn.ModuleDict({"backbone": mlp(torch.float32)}))
    with pytest.raises(ValueError, match=r"no parameter.*wrapped"):
        mas.load(saved, strict=False)
    assert mas.num_tasks == 0


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]
IMPOSSIBLE = [
    ("importance", torch.tensor(math.nan)),
    ("importance", torch.ones(8, 6).neg()),
    ("importance", torch.ones(8, 6).long()),
    ("importance", [1.0]),
    ("anchor", torch.tensor(math.inf)),
    ("open", torch.tensor(-1e-30)),
]
DAMAGED = [
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
    ("importance_scales", {"0.weight": torch.zeros(1)}),
    ("merge", "median"),
    ("reduction", None),
    ("reduction", 3),
    ("reduction", "cube"),
    ("lambda_reg", -1.0),
    ("lambda_reg", None),
    ("lambda_reg", True),
    ("lambda_reg", 10**400),
    ("drift", 10**400),
    ("drift", {"*": "much"}),
    ("num_tasks", -1),
    ("num_tasks", 1),  # fewer than the parameters were measured in
    ("tasks", dict.fromkeys(NAMES, "2")),
    ("num_samples", dict.fromkeys(NAMES, 0)),
    ("energy", {"mean": 1.0}),
    ("energy", {"mean": math.nan, "tasks": 2}),
    ("energy", {"mean": 1.0, "tasks": -1}),
    ("seen", {"samples": 3, "weight": 3, "energy": "x"}),
    ("seen", {"samples": 3, "weight": 3, "energy": 1.0, "more": 1}),
    *((group, dict.fromkeys(NAMES, value)) for group, value in IMPOSSIBLE),
]


@pytest.mark.parametrize(("key", "value"), DAMAGED, ids=str)
def test_a_damaged_state_dict_is_refused(key, value):
    mas = used()
    damaged = {**plain_state(mas), "lambda_reg": 77.0, key: value}
    if value is None:
        del damaged[key]
    case = refusal(lambda: mas.load_state_dict(damaged), ValueError, key.split("_")[0])
    assert_refused(case, unchanged=(mas,))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        lambda state: None,
        lambda state: state["importance"],
        lambda state: {"format": "mas_ext", "version": "1"},
        lambda state: {"format": "mas_ext", "version": 0},
        lambda state: {**state, "settings": state["counts"][:1]},
        lambda state: {**state, "counts": state["counts"][:1]},
        lambda state: {**state, "open": {}},
    ],
)
def test_what_is_no_state_dict_is_refused(change):
    mas = used()
    state = change(mas.state_dict())
    assert_refused(refusal(lambda: mas.load_state_dict(state), ValueError), unchanged=(mas,))


def test_room_that_is_missing_is_asked_for():
    """A state that was loaded in place, where there was no tensor to load into."""
    cases = {
        "open": ("in the middle of a task", "update_importance()"),
        "earlier": ("sum_of_sums", "merge='sum_of_sums'"),
    }
    for group, words in cases.items():
        mas = used(merge="sum_of_sums")
        state = {**mas.state_dict(), group: {}}
        case = refusal(lambda s=state, m=mas: m.load_state_dict(s), ValueError, *words)
        assert_refused(case, unchanged=(mas,))


def test_codes_are_the_same_again_after_a_file_and_after_a_state_dict(tmp_path):
    _, mas = learned(state_dtype="uint8", dtype=torch.float32)
    mas.save(tmp_path / "mas")
    for load in (lambda m: m.load(tmp_path / "mas"), lambda m: m.load_state_dict(mas.state_dict())):
        _, other = learned(state_dtype="uint8", dtype=torch.float32, moved=False)
        load(other)
        other.save(tmp_path / "again")
        assert_states_equal(*(checkpoint.read(tmp_path / name) for name in ("again", "mas")))
