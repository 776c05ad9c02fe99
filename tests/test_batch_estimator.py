"""What else the "batch" estimator can be told: how batches weigh, and in which mode."""

import pytest
import torch
from torch import nn

from mas_ext import MAS, estimate_importance
from tests.models import assert_same, convnet, images, mlp, vectors


def mean_of_batches(model, batches):
    """1/K Σ |∇ mean ‖F‖²|, in the mode the model is in."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        scalar = model(batch).flatten(1).square().sum(1).mean()
        grads = torch.autograd.grad(scalar, list(model.parameters()))
        for name, g in zip(total, grads, strict=True):
            total[name] += g.abs() / len(batches)
    return total


@pytest.mark.parametrize("size", [1, 3, 5, 10])
def test_batches_may_count_the_same(size):
    model, batches = mlp(), vectors().split(size)  # of 10: 3 leaves a short one
    omega = estimate_importance(model, batches, estimator="batch", weighting="batches")
    assert_same(omega, mean_of_batches(model, batches))
    assert omega.num_samples == 10
    by_samples = estimate_importance(model, batches, estimator="batch")
    same = all(torch.allclose(omega[name], by_samples[name]) for name in omega)
    assert same == (10 % size == 0)


def test_a_batch_counts_once_over_several_updates():
    model, x = mlp(), vectors()
    mas = MAS(model)
    how = {"estimator": "batch", "weighting": "batches"}
    mas.update_importance([x[:4], x[4:8]], **how)
    mas.consolidate([x[8:]], **how)
    assert_same(mas.importance, mean_of_batches(model, [x[:4], x[4:8], x[8:]]))


def test_a_cut_batch_and_an_empty_one():
    model, x = mlp(), vectors()
    how = {"estimator": "batch", "weighting": "batches"}
    cut = estimate_importance(model, x.split(4), max_samples=6, **how)
    assert_same(cut, mean_of_batches(model, [x[:4], x[4:6]]))
    with_empty = estimate_importance(model, [x[:4], x[:0], x[4:6]], **how)
    assert_same(with_empty, cut)


def test_training_mode_measures_with_dropout_and_the_batchs_statistics_and_leaves_no_trace():
    model, batches = convnet().eval(), images().split(2)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    generator = torch.get_rng_state()
    how = {"estimator": "batch", "weighting": "batches", "training": True}
    omega = estimate_importance(model, batches, **how)
    assert not any(module.training for module in model.modules())
    assert_same(model.state_dict(), before, 0, 0)
    assert torch.equal(torch.get_rng_state(), generator)
    model.train()
    assert_same(omega, mean_of_batches(model, batches), rtol=1e-9, atol=1e-12)


def test_training_mode_accepts_what_has_no_running_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False)).double()
    with pytest.raises(ValueError, match="track_running_stats"):
        estimate_importance(model, [vectors()], estimator="batch")
    omega = estimate_importance(model, [vectors()], estimator="batch", training=True)
    assert_same(omega, mean_of_batches(model, [vectors()]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["per_sample", "local"])
@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"weighting": "batches"}, ValueError, "weighting: .*every sample.*estimator='batch'"),
        ({"weighting": "tasks"}, ValueError, "weighting: 'tasks' is unknown; use 'samples'"),
        ({"training": True}, ValueError, "training: .*dropout.*estimator='batch'"),
        ({"training": "no"}, TypeError, "training is 'no'; pass True or False"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together(estimator, option, error, message):
    with pytest.raises(error, match=message):
        estimate_importance(mlp(), [vectors()], estimator=estimator, **option)
