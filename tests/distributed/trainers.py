"""Both libraries' Trainers on several processes; LIBRARY and FOLDER are its arguments."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import mas_ext
from tests.support.processes import leave
from tests.support.regularizers import assert_states_equal
from tests.support.trainers import LIBRARIES, vectors
from tests.support.zoo.small import assert_same

SAMPLES = 24


def assert_same_everywhere(tensors):
    """Bit for bit what the first rank has."""
    for name, tensor in tensors.items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def exact(model, seed):
    x = vectors(seed, SAMPLES)[0].split(4)
    data = [{"x": batch} for batch in x] if model.__class__.__name__ == "Classifier" else x
    return mas_ext.estimate_importance(model, data)


def assert_whole(mas, expected, model):
    """Ω of all samples, on every rank, and weights that have not parted."""
    assert_same(mas.importance, expected, rtol=1e-9, atol=1e-12)
    for tensors in (mas.importance, mas.anchor, dict(model.named_parameters())):
        assert_same_everywhere(tensors)


def check(library, folder):
    options = {"lr": 0.05, "momentum": 0.9}
    if library.name == "lightning":
        options |= {"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"}
    model, callback, recorder = library.model(), library.MASCallback(5.0), library.Recorder()
    library.learn(model, library.data(1, SAMPLES), callback, folder / "first", **options)
    assert_whole(callback.mas, exact(model, 1), model)
    first = {name: omega.clone() for name, omega in callback.mas.importance.items()}
    options |= {"saves": True}
    data = library.data(2, SAMPLES)
    library.learn(model, data, callback, folder, others=[recorder], **options)
    assert recorder.logged[-1] > 0
    new = exact(model, 2)
    assert_whole(callback.mas, {name: first[name] + new[name] for name in first}, model)
    # And from the middle, in a model and a callback that know nothing.
    again, resumed = library.model(7), library.MASCallback()
    resume = library.checkpoint(folder, 3)
    library.learn(again, library.data(2, SAMPLES), resumed, folder, resume=resume, **options)
    assert_states_equal(again.state_dict(), model.state_dict())
    assert_same(resumed.mas.importance, callback.mas.importance, 0, 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    check(LIBRARIES[sys.argv[1]](), Path(sys.argv[2]))
    leave()
