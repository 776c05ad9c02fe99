"""Stopped at any moment, a measurement goes on to the same bits, a file is the old or the new."""

import os
import random

import pytest
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, TensorDataset

from mas_ext import MAS
from mas_ext._state import tensor_file
from mas_ext._state.atomic_write import replacing
from tests import killed
from tests.models import assert_same, convnet, images, mlp, vectors
from tests.test_regularizer import assert_states_equal, move

X = vectors(dtype=torch.float32)


class Stop(Exception):
    """Stands for the end of the process."""


def stopping_at(samples):
    def progress(done):
        if done >= samples:
            raise Stop

    return progress


def learned():
    model = mlp(torch.float32)
    mas = MAS(model)
    mas.consolidate([X])
    move(model)
    mas.update_importance([X[:3]])
    return mas


# -- one process, stopped by an error ------------------------------------------------------------


@pytest.mark.parametrize("stops", [[5], [1, 4, 9], [2, 2, 3]], ids=str)
def test_a_measurement_goes_on_to_the_same_bits(tmp_path, stops):
    whole, parts, kept = learned(), learned(), tmp_path / "measuring"
    for at in stops:
        with pytest.raises(Stop):
            parts.consolidate(X.split(1), checkpoint=kept, save_every=2, progress=stopping_at(at))
        assert kept.exists() == (at > 2)
    seen = []
    parts.consolidate(X.split(1), checkpoint=kept, save_every=2, progress=seen.append)
    whole.consolidate(X.split(1))
    assert_states_equal(parts.state_dict(), whole.state_dict())
    assert seen == list(range(11 - len(seen), 11)), "progress counts what was measured before"
    assert len(seen) <= 10 - (stops[-1] - 2) // 2 * 2
    assert os.listdir(tmp_path) == []


CASES = {
    "per_sample": {},
    "a forward of one's own": {"forward": lambda model, batch: model(batch[0])},
    "an objective of one's own": {"objective": lambda output: output.abs().amax(1)},
    "not all samples": {"max_samples": 19},
    "dropout and batch statistics": {
        "estimator": "batch",
        "weighting": "batches",
        "training": True,
    },
    "forward only": {"estimator": "local"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:estimator='local'")
def test_random_numbers_and_settings_go_on(tmp_path, case):
    def run(seed, **keep):
        """A process: its model, its random numbers, a loader that shuffles by them."""
        model = convnet(torch.float32)
        mas = MAS(model)
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(images(24, torch.float32)), 2, shuffle=True)
        mas.consolidate(loader, **CASES[case], **keep)
        return mas.state_dict()

    keep = {"checkpoint": tmp_path / "measuring", "save_every": 4}
    with pytest.raises(Stop):
        run(1, progress=stopping_at(11), **keep)
    with pytest.raises(Stop):
        run(2, progress=stopping_at(17), **keep)
    assert_states_equal(run(3, **keep), run(1))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def stopped(tmp_path):
    """The file of a measurement that was stopped."""
    path = tmp_path / "measuring"
    with pytest.raises(Stop):
        learned().consolidate(X.split(1), checkpoint=path, save_every=2, progress=stopping_at(6))
    return path


def refused(path, match, mas=None, data=None, **how):
    """Nothing is changed, neither the state nor the file."""
    mas, content = mas or learned(), path.read_bytes()
    before = mas.state_dict()
    for measure in (mas.update_importance, mas.consolidate):
        with pytest.raises(ValueError, match=match):
            measure(data or X.split(1), checkpoint=path, **how)
        assert_states_equal(mas.state_dict(), before)
        assert path.read_bytes() == content


def test_another_measurements_file_is_refused(stopped):
    refused(
        stopped,
        r"another measurement: its objective is 'squared_l2', here it is 'l1'.*delete",
        objective="l1",
    )
    refused(stopped, r"its estimator is 'per_sample', here it is 'batch'", estimator="batch")
    refused(stopped, r"its max_samples is None, here it is 8", max_samples=8)
    moved = learned()
    move(moved._index.model)
    refused(stopped, "its parameters is", moved)
    refused(
        stopped, r"data: it has at most 3 batches, and 4 were measured before", data=X[:3].split(1)
    )
    refused(
        stopped, r"data: it has at most 4 batches, and 4 were measured before", data=X[:4].split(1)
    )


def test_the_file_of_a_measurement_that_is_in_the_state_is_written_anew(stopped):
    """One of several ranks may be killed when all have ended, before it removes its file."""
    mas, whole = learned(), learned()
    for other in (mas, whole):
        other.consolidate(X.split(1))
    mas.update_importance(X[:5].split(1), checkpoint=stopped)
    whole.update_importance(X[:5].split(1))
    assert_states_equal(mas.state_dict(), whole.state_dict())
    assert not stopped.exists()


def test_a_file_of_another_kind_is_refused(stopped):
    content = bytearray(stopped.read_bytes())
    content[-5] ^= 1
    stopped.write_bytes(content)
    refused(stopped, "checksum does not match")
    learned().save(stopped)
    refused(stopped, "no measurement that this mas_ext began")


def test_a_measurement_is_no_state(stopped):
    with pytest.raises(ValueError, match="is not a mas_ext state"):
        learned().load(stopped)


@pytest.mark.parametrize("save_every", [0, -1, 2.5, True, None])
def test_a_bad_interval_is_refused(tmp_path, save_every):
    with pytest.raises(ValueError, match=r"save_every is .*positive number of samples"):
        learned().update_importance([X], checkpoint=tmp_path / "m", save_every=save_every)


def test_a_checkpoint_that_is_no_path_is_refused():
    with pytest.raises(TypeError, match=r"checkpoint is True; pass the path of a file"):
        learned().update_importance([X], checkpoint=True)


def test_only_what_is_finite_is_kept(tmp_path):
    seen = []
    with pytest.raises(ValueError, match=r"gradient of parameter '0.weight' is NaN or Inf"):
        learned().consolidate(
            X.split(1),
            objective=lambda output: (0 * output).abs().sqrt().sum(1),
            checkpoint=tmp_path / "measuring",
            save_every=2,
            progress=seen.append,
        )
    assert seen == [1, 2], "it is noticed when the file is due"
    assert os.listdir(tmp_path) == []


# -- processes, killed ---------------------------------------------------------------------------


def kill_while_learning(folder, how, kills, seed):
    """Kills it so often, restarts it each time, and compares with a process that nobody killed.

    Returns:
        The phases in which it was killed.
    """
    chance, phases = random.Random(seed), []
    for name in ("whole", "parts"):
        (folder / name).mkdir()
    killed.ended(killed.learn, folder / "whole", how, False)
    whole = (folder / "whole" / "mas").read_bytes()
    while len(phases) < kills:
        moment = chance.randrange(killed.TASKS * killed.SAMPLES + 1)
        stage = killed.killed(
            killed.learn, folder / "parts", how, moment=moment, delay=chance.uniform(0, 0.003)
        )
        if stage is not None:
            phases.append(stage.phase)
            continue
        assert (folder / "parts" / "mas").read_bytes() == whole
        (folder / "parts" / "mas").unlink()  # from the beginning
    killed.ended(killed.learn, folder / "parts", how)
    assert (folder / "parts" / "mas").read_bytes() == whole
    assert os.listdir(folder / "parts") == ["mas"], "nothing piles up"
    return phases


@pytest.mark.parametrize("how", killed.HOW)
def test_a_killed_measurement_goes_on_to_the_same_bits(tmp_path, how):
    assert killed.MEASURING in kill_while_learning(tmp_path, how, 3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("how", killed.HOW)
def test_many_killed_measurements_go_on_to_the_same_bits(tmp_path, how):
    phases = kill_while_learning(tmp_path, how, 40, seed=1)
    assert phases.count(killed.MEASURING) >= 30


def kill_while_saving(folder, kills, seed):
    """Kills a process that saves two states in turn.

    Returns:
        How often it was in the middle of writing.
    """
    chance, contents = random.Random(seed), []
    for mas in killed.states():
        mas.save(folder / "mas")
        contents.append((folder / "mas").read_bytes())
    broken_off = 0
    for _ in range(kills):
        stage = killed.killed(
            killed.save, folder, moment=chance.randrange(3), delay=chance.uniform(0, 0.02)
        )
        found = (folder / "mas").read_bytes()
        assert found in contents
        if stage.done:  # the last one that was saved, or the one that was being saved
            assert found in (contents[(stage.done - 1) % 2], contents[stage.done % 2])
        left = [name for name in os.listdir(folder) if name != "mas"]
        assert len(left) <= 1, "the next writer clears away what a killed one left"
        broken_off += len(left)
    killed.states()[0].save(folder / "mas")
    assert os.listdir(folder) == ["mas"]
    return broken_off


def test_a_killed_save_leaves_the_old_file_or_the_new(tmp_path):
    assert kill_while_saving(tmp_path, 10, seed=0) > 0


@pytest.mark.slow
def test_many_killed_saves_leave_the_old_file_or_the_new(tmp_path):
    assert kill_while_saving(tmp_path, 120, seed=1) > 20


# -- files ---------------------------------------------------------------------------------------


def test_a_file_that_is_being_written_is_not_cleared_away(tmp_path):
    """Two writers at a time: the last one to end wins, and both end."""
    mas, other = learned(), learned()
    other.consolidate()
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
    learned().save(tmp_path / "mas")
    assert sorted(os.listdir(tmp_path)) == sorted(["mas", *names])


def test_safetensors_reads_what_is_written(tmp_path):
    """Of every dtype, empty and 0-dim, and each at a place that its dtype can be read from."""
    tensors = {
        f"{n}/{dtype}": (100 * torch.randn(shape, dtype=torch.float64)).to(dtype)
        for n, shape in enumerate([(), (0,), (3,), (2, 0, 3), (5, 1, 2)])
        for dtype in tensor_file.DTYPES
    }
    tensor_file.write(tmp_path / "file", {"quotes": '"sha256":"' + 64 * "0"}, tensors)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    settings, read = tensor_file.read(tmp_path / "file", lambda settings: None)
    assert settings == {"quotes": '"sha256":"' + 64 * "0"}
    assert_same(read, tensors, 0, 0)
