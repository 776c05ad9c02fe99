"""Both libraries' Trainers on several processes; LIBRARY and FOLDER are its arguments."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.leaving import leave
from tests.models import assert_same


def assert_same_everywhere(tensors):
    """Bit for bit what the first rank has."""
    for name, tensor in tensors.items():
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def assert_whole(mas, expected, model):
    """Ω of all samples, on every rank, and weights that have not parted."""
    assert_same(mas.importance, expected, rtol=1e-9, atol=1e-12)
    assert_same_everywhere(mas.importance)
    assert_same_everywhere(mas.anchor)
    assert_same_everywhere(dict(model.named_parameters()))


def check_transformers(folder):
    import mas_ext
    from mas_ext.integrations.transformers import FILE, MASCallback
    from tests.trainer import Classifier, learn, vectors

    model, callback = Classifier(), MASCallback(5.0)
    learn(model, vectors(1, 24), callback, folder)
    x = torch.stack([row["x"] for row in vectors(1, 24)])
    assert_whole(callback.mas, mas_ext.estimate_importance(model, x.split(4)), model)
    first = {name: omega.clone() for name, omega in callback.mas.importance.items()}
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer = learn(model, vectors(2, 24), callback, folder, **saving)
    assert any(entry.get("mas_penalty", 0) > 0 for entry in trainer.state.log_history)
    new = mas_ext.estimate_importance(
        model, torch.stack([row["x"] for row in vectors(2, 24)]).split(4)
    )
    assert_whole(callback.mas, {name: first[name] + new[name] for name in first}, model)
    # And from the middle, in a model and a callback that know nothing.
    again, resumed = Classifier(7), MASCallback()
    folder = folder / "checkpoint-4"
    assert (folder / FILE).is_file()
    learn(again, vectors(2, 24), resumed, folder.parent, resume=str(folder), **saving)
    assert_same(again.state_dict(), model.state_dict(), 0, 0)
    assert_same(resumed.mas.importance, callback.mas.importance, 0, 0)


def check_lightning(folder):
    import mas_ext
    from mas_ext.integrations.lightning import MASCallback
    from tests.test_lightning import Classifier, batches, learn, vectors

    module, callback = Classifier(), MASCallback(5.0)
    options = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": "ddp"}
    learn(module, batches(1, count=24), callback, folder, **options)
    x = torch.stack([x for x, _ in vectors(1, 24)])
    assert_whole(callback.mas, mas_ext.estimate_importance(module, x.split(4)), module)
    learn(module, batches(2, count=24), callback, folder, **options)
    assert callback.mas.num_tasks == 2
    assert_same_everywhere(callback.mas.importance)
    assert_same_everywhere(dict(module.named_parameters()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    {"transformers": check_transformers, "lightning": check_lightning}[sys.argv[1]](
        Path(sys.argv[2])
    )
    leave()
