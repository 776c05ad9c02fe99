"""Measurements and files that are stopped at any moment: the same bits, the old file or the new."""

import math
import os
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mas_ext import MAS
from tests.support import killed, regularizers
from tests.support.mutated import File
from tests.support.regularizers import assert_refused, assert_states_equal, refusal
from tests.support.zoo.small import convnet, images, vectors

X = vectors(dtype=torch.float32)


class Stop(Exception):
    """Stands for the end of the process."""


def stopping_at(samples):
    def progress(done):
        if done >= samples:
            raise Stop

    return progress


def learned(moved=True):
    _, mas = regularizers.learned(dtype=torch.float32, moved=moved)
    mas.update_importance([X[:3]])
    return mas


# -- One process, stopped by an error --------------------------------------------------------------
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


HOW = {
    "per_sample": {},
    "a forward of one's own": {"forward": lambda model, batch: model(batch[0])},
    "an objective of one's own": {"objective": lambda output: output.abs().amax(1)},
    "not all samples": {"max_samples": 19},
    "dropout": {"estimator": "batch", "weighting": "batches", "training": True},
    "forward only": {"estimator": "local"},
    "labels that are drawn": {"criterion": "fisher", "draws": 2, "seed": 5},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.filterwarnings("ignore:estimator='local'")
def test_random_numbers_and_settings_go_on(tmp_path, how):
    def run(seed, **more):
        """A process: its model, its random numbers, a loader that shuffles by them."""
        mas = MAS(convnet(torch.float32))
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(images(24, torch.float32)), 2, shuffle=True)
        mas.consolidate(loader, **HOW[how], **more)
        return mas.state_dict()

    kept = {"checkpoint": tmp_path / "measuring", "save_every": 4}
    for seed, at in ((1, 11), (2, 17)):
        with pytest.raises(Stop):
            run(seed, progress=stopping_at(at), **kept)
    assert_states_equal(run(3, **kept), run(1))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def stopped(tmp_path):
    """The file of a measurement that was stopped."""
    path = tmp_path / "measuring"
    with pytest.raises(Stop):
        learned().consolidate(X.split(1), checkpoint=path, save_every=2, progress=stopping_at(6))
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def forge(change):
    """Changes a file in a way that its checksum does not tell."""

    def damage(path):
        file = File.of(path.read_bytes())
        change(file, {one.name: one for one in file.entries})
        path.write_bytes(file.content(is_repaired=True))

    return {"damage": damage}


def cut(entry, shape):
    entry.shape, entry.data = shape, entry.data[: entry.itemsize * math.prod(shape)]


FORGED = {
    "no sums": (lambda file, named: file.entries.remove(named["sums/0.bias"]), "sums"),
    "sums that broadcast": (lambda file, named: cut(named["sums/0.weight"], [1, 6]), "sums"),
    "negative sums": (
        lambda file, named: vars(named["sums/0.bias"]).update(data=b"\xbf\x80" * 16), "sums",
    ),
    "integer sums": (lambda file, named: vars(named["sums/0.bias"]).update(dtype="I32"), "sums"),
    "no random state": (lambda file, named: file.entries.remove(named["left/cpu"]), "left"),
    "a short random state": (lambda file, named: cut(named["began/cpu"], [7]), "began"),
    "batches": (lambda file, named: file.settings.update(batches=-2), "batches"),
    "samples": (lambda file, named: file.settings.update(samples="4"), "samples"),
    "no energy": (lambda file, named: file.settings.pop("energy"), "energy"),
    "about nothing": (lambda file, named: file.settings.update(about=None), "measurement"),
    "about another": (lambda file, named: file.settings["about"].pop("tasks"), "measurement"),
}  # fmt: skip


# What is different → what the error names. Nothing is changed, neither the state nor the file.
OTHERS = {
    "objective": ({"objective": "l1"}, "objective", "'squared_l2'", "'l1'", "delete"),
    "estimator": ({"estimator": "batch"}, "estimator", "'per_sample'", "'batch'"),
    "max_samples": ({"max_samples": 8}, "max_samples", "8"),
    "criterion": ({"criterion": "gauss_newton", "reduction": "abs"}, "criterion", "'mas'"),
    "seed": ({"seed": 3}, "seed", "3"),
    "parameters": ({"moved": False}, "parameters"),
    "three batches": ({"data": X[:3].split(1)}, "data", "at most 3", "4"),
    "four batches": ({"data": X[:4].split(1)}, "data", "at most 4", "4"),
    "a flipped bit": ({"damage": flip}, "checksum"),
    "a state": ({"damage": lambda path: learned().save(path)}, "no measurement"),
    **{case: (forge(change), "damaged", *words) for case, (change, *words) in FORGED.items()},
}


@pytest.mark.parametrize("measure", ["update_importance", "consolidate"])
@pytest.mark.parametrize("case", OTHERS)
def test_another_measurements_file_is_refused(stopped, case, measure):
    how, *words = OTHERS[case]
    how = {"data": X.split(1), "moved": True, "damage": lambda path: None, **how}
    mas = learned(how.pop("moved"))
    how.pop("damage")(stopped)
    content = stopped.read_bytes()
    call = refusal(lambda: getattr(mas, measure)(checkpoint=stopped, **how), ValueError, *words)
    assert_refused(call, unchanged=(mas,))
    assert stopped.read_bytes() == content


def test_the_file_of_a_measurement_that_is_in_the_state_is_written_anew(stopped):
    """One of several ranks may be killed when all have ended, before it removes its file."""
    mas, whole = learned(), learned()
    for other in (mas, whole):
        other.consolidate(X.split(1))
    mas.update_importance(X[:5].split(1), checkpoint=stopped)
    whole.update_importance(X[:5].split(1))
    assert_states_equal(mas.state_dict(), whole.state_dict())
    assert not stopped.exists()


@pytest.mark.parametrize("save_every", [0, -1, 2.5, True, None])
def test_arguments_that_make_no_sense_are_refused(tmp_path, save_every):
    mas = learned()
    for kind, how, *words in (
        (ValueError, {"checkpoint": tmp_path / "m", "save_every": save_every}, "positive"),
        (TypeError, {"checkpoint": True}, "path"),
    ):
        case = refusal(lambda how=how: mas.update_importance([X], **how), kind, *how, *words)
        assert_refused(case._replace(words=case.words[-2:]), unchanged=(mas,))


def test_only_what_is_finite_is_kept(tmp_path):
    seen = []
    with pytest.raises(ValueError, match=r"'0.weight' is NaN or Inf"):
        learned().consolidate(
            X.split(1),
            objective=lambda output: (0 * output).abs().sqrt().sum(1),
            checkpoint=tmp_path / "measuring",
            save_every=2,
            progress=seen.append,
        )
    assert seen == [1, 2], "it is noticed when the file is due"
    assert os.listdir(tmp_path) == []


# -- Processes that are killed ---------------------------------------------------------------------
SAMPLES, TASKS = 128, 2
KILLED = {name: HOW[name] for name in ("per_sample", "dropout")}


def moved_to(model: nn.Module, task: int) -> None:
    """What training would do."""
    torch.manual_seed(task)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))


def learn(folder, stage, rank, how):
    """Learns the tasks that its file does not have yet."""
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 4))
    mas = MAS(model)
    if (folder / "mas").exists():
        mas.load(folder / "mas")
    for task in range(mas.num_tasks, TASKS):
        moved_to(model, task)
        if (folder / "measuring").exists():
            torch.manual_seed(os.getpid())  # a restarted process has other random numbers

        def progress(done, task=task):
            stage.done = task * SAMPLES + done

        data = TensorDataset(vectors(SAMPLES, torch.float32) + task)
        stage.phase = killed.MEASURING
        # Whoever is not to be killed keeps nothing.
        kept = {} if folder.name == "whole" else {"checkpoint": folder / "measuring"}
        loader = DataLoader(data, 4, shuffle=True)
        mas.consolidate(loader, progress=progress, save_every=8, **KILLED[how], **kept)
        stage.phase = killed.SAVING
        mas.save(folder / "mas")
        stage.phase = killed.BETWEEN


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", KILLED)
def test_a_killed_measurement_goes_on_to_the_same_bits(tmp_path, how, kills):
    def moment(chance):
        return chance.randrange(TASKS * SAMPLES + 1)

    phases = killed.kill_while_learning(
        learn, tmp_path, how, kills=kills, seed=kills, moment=moment, longest=0.003
    )
    assert phases.count(killed.MEASURING) >= kills // 2


def states():
    """Two states of one model, a file of either taking some milliseconds."""
    both = []
    for task in range(2):
        model = nn.Linear(512, 512)
        moved_to(model, task)
        both.append(MAS(model))
        both[-1].consolidate([torch.ones(1, 512)], estimator="batch")
    return both


def save(folder, stage, rank):
    """Saves the two in turn, for ever."""
    torch.set_num_threads(1)
    both = states()
    stage.phase = killed.SAVING
    while True:
        both[stage.done % 2].save(folder / "mas")
        stage.done += 1


@pytest.mark.parametrize("kills", [10, pytest.param(120, marks=pytest.mark.slow)])
def test_a_killed_save_leaves_the_old_file_or_the_new(tmp_path, kills):
    chance, contents = random.Random(kills), []
    for mas in states():
        mas.save(tmp_path / "mas")
        contents.append((tmp_path / "mas").read_bytes())
    broken_off = 0
    for _ in range(kills):
        moment, delay = chance.randrange(3), chance.uniform(0, 0.02)
        done = killed.run(save, tmp_path, moment=moment, delay=delay).done
        found = (tmp_path / "mas").read_bytes()
        assert found in contents
        if done:  # the last one that was saved, or the one that was being saved
            assert found in (contents[(done - 1) % 2], contents[done % 2])
        left = [name for name in os.listdir(tmp_path) if name != "mas"]
        assert len(left) <= 1, "the next writer clears away what a killed one left"
        broken_off += len(left)
    states()[0].save(tmp_path / "mas")
    assert os.listdir(tmp_path) == ["mas"]
    assert broken_off > kills // 10, "some were killed in the middle of writing"
