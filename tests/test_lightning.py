"""Lightning's own Trainer on small random models: against loops by hand, and resumed."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of optional parts that are not installed
    L = pytest.importorskip("lightning.pytorch", reason="needs mas_ext[lightning]")
    from lightning.pytorch.callbacks import ModelCheckpoint

import mas_ext
from mas_ext._state.distributed_checkpoint import unpacked
from mas_ext.integrations.lightning import MASCallback
from tests.hand_loop import ByHand
from tests.models import assert_same, mlp
from tests.oracle import assert_exact, one_by_one

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*ckpt_path"
)


class Classifier(L.LightningModule):
    def __init__(self, seed=0, lr=0.5, momentum=0.0, dtype=torch.float64):
        super().__init__()
        self.lr, self.momentum = lr, momentum
        self.body = mlp(dtype)
        torch.manual_seed(seed)
        for p in self.body.parameters():
            nn.init.normal_(p, std=0.5)

    def forward(self, x):
        return self.body(x)

    def loss(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=self.momentum)


class ByItself(Classifier):
    """Manual optimization, with an optimizer for each layer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.body[k].parameters(), self.lr) for k in (0, 2)]


def vectors(seed, count=20, dtype=torch.float64):
    numbers = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=numbers, dtype=dtype)
    return list(zip(x, torch.randint(4, (count,), generator=numbers), strict=True))


def batches(seed, **options):
    return DataLoader(vectors(seed, **options), batch_size=4)


class Recorder(L.Callback):
    """What is logged at every batch."""

    def __init__(self):
        self.penalties = []

    def on_train_batch_end(self, trainer, module, *args):
        self.penalties.append(float(trainer.callback_metrics.get("mas_penalty", "nan")))


def trainer(folder, callbacks, **options):
    return L.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": False, **options},
    )


def learn(module, data, callback, folder, others=(), path=None, **options):
    made = trainer(folder, [callback, *others], **options)
    made.fit(module, data, ckpt_path=path)
    return made


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_trainer_is_the_loop_by_hand(tmp_path, mode, accumulate):
    most = 0.02
    module, callback, recorder = Classifier(), MASCallback(5.0, mode=mode), Recorder()
    learn(module, batches(1), callback, tmp_path)
    hand = ByHand(module, callback.mas.importance, 5.0)
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": most}
    learn(module, batches(2), callback, tmp_path, [recorder], **options)

    optimizer = torch.optim.SGD(hand.model.parameters(), module.lr)
    data = list(batches(2))
    for _ in range(2):
        for k in range(0, 5, accumulate):
            optimizer.zero_grad()
            for batch in data[k : k + accumulate]:
                # Lightning divides by the same number also where an epoch's last step has fewer.
                (hand.model.loss(batch) / accumulate).backward()
            norm = nn.utils.clip_grad_norm_(hand.model.parameters(), most)
            assert norm > most, "nothing was clipped"
            hand.before_step(mode)
            optimizer.step()
            hand.after_step(mode, module.lr)

    assert_same(dict(module.named_parameters()), dict(hand.model.named_parameters()))
    assert max(hand.penalties) > 1e-6
    # Of batches 3 and 5 of an epoch, where a step has three.
    stepped = [k for k in range(10) if (k % 5 + 1) % accumulate == 0 or k % 5 == 4]
    logged = [recorder.penalties[k] for k in stepped]
    assert logged == pytest.approx(hand.penalties, rel=1e-6)  # Lightning logs in float32


def test_manual_optimization_with_two_optimizers(tmp_path):
    module, callback, recorder = ByItself(), MASCallback(5.0), Recorder()
    learn(module, batches(1), callback, tmp_path)
    hand = ByHand(module, callback.mas.importance, 5.0)
    learn(module, batches(2), callback, tmp_path, [recorder])
    optimizer = torch.optim.SGD(hand.model.parameters(), module.lr)
    for _ in range(2):
        for batch in batches(2):
            optimizer.zero_grad()
            hand.model.loss(batch).backward()
            hand.before_step("gradient")
            optimizer.step()
    assert_same(dict(module.named_parameters()), dict(hand.model.named_parameters()))
    assert recorder.penalties == pytest.approx(hand.penalties, rel=1e-6)
    assert max(hand.penalties) > 1e-6


def test_before_the_first_task_a_trainer_trains_as_without(tmp_path):
    modules, recorder = (Classifier(), Classifier()), Recorder()
    learn(modules[0], batches(1), L.Callback(), tmp_path)
    learn(modules[1], batches(1), MASCallback(100.0), tmp_path, [recorder])
    assert_same(modules[1].state_dict(), modules[0].state_dict(), 0, 0)
    assert all(penalty != penalty for penalty in recorder.penalties), "nothing is logged"


# -- the end of a task -----------------------------------------------------------------------------


def test_the_end_of_fit_measures_its_data_exactly(tmp_path):
    module, callback = Classifier(), MASCallback()
    learn(module, batches(1), callback, tmp_path, limit_train_batches=3)
    x = torch.stack([x for x, _ in vectors(1)])[:12]
    assert_exact(callback.mas.importance, one_by_one(copy.deepcopy(module.cpu()), [x]))
    assert_same(dict(callback.mas.anchor), dict(module.named_parameters()), 0, 0)


def test_in_true_half_precision_the_inputs_are_too(tmp_path):
    module, callback = Classifier(dtype=torch.bfloat16), MASCallback()
    learn(module, batches(1, dtype=torch.float32), callback, tmp_path, precision="bf16-true")
    x = torch.stack([x for x, _ in vectors(1, dtype=torch.float32)]).to(torch.bfloat16)
    assert_same(callback.mas.importance, mas_ext.estimate_importance(module, x.split(4)), 0, 0)


def test_a_part_of_the_module_and_further_options(tmp_path):
    module = Classifier()
    mas = mas_ext.MAS(module.body, 2.0, params=["2.*"])
    callback = MASCallback(mas=mas, max_samples=6, estimator="batch", objective="l1")
    learn(module, batches(1), callback, tmp_path)
    assert callback.mas is mas
    x = torch.stack([x for x, _ in vectors(1)])
    how = {"params": ["2.*"], "estimator": "batch", "objective": "l1", "max_samples": 6}
    expected = mas_ext.estimate_importance(module.body, x.split(4), **how)
    assert_same(mas.importance, expected, 0, 0)


def test_what_has_not_trained_does_not_end_a_task(tmp_path):
    module, callback = Classifier(), MASCallback()
    made = learn(module, batches(1), callback, tmp_path)
    made.fit(module, batches(1))  # its epochs are over
    assert callback.mas.num_tasks == 1


def test_consolidating_by_hand(tmp_path):
    module, callback = Classifier(), MASCallback(consolidate=False, max_samples=8)
    learn(module, batches(1), callback, tmp_path)
    assert callback.mas.num_tasks == 0
    callback.consolidate(batches(1))
    expected = mas_ext.estimate_importance(module, batches(1), max_samples=8)
    assert_same(callback.mas.importance, expected, 0, 0)


def test_a_fit_that_is_broken_off_leaves_no_hook(tmp_path):
    class Break(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken off")

    module, callback = Classifier(), MASCallback(2.0)
    made = trainer(tmp_path, [callback, Break()])
    with pytest.raises(RuntimeError, match="broken off"):
        made.fit(module, batches(1))
    assert not made.optimizers[0]._optimizer_step_pre_hooks
    learn(module, batches(1), callback, tmp_path)
    assert callback.mas.num_tasks == 1


# -- keeping ---------------------------------------------------------------------------------------


class Resumable:
    """Batches that continue where a checkpoint was made, which a DataLoader's do not."""

    def __init__(self, seed):
        self.data, self.position = vectors(seed), 0

    def __len__(self):
        return 5

    def __iter__(self):
        for k in range(self.position % len(self), len(self)):
            self.position = k + 1
            rows = self.data[k :: len(self)]
            yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Death(L.Callback):
    """Ends a training in the middle of its second epoch."""

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 8:
            raise RuntimeError("killed")


def saving(folder):
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def second_task(module, callback, folder, others=()):
    """A, whose end the same Trainer does not see, and B, with a checkpoint at every step."""
    learn(module, Resumable(1), callback, folder, max_epochs=1)
    options = {"enable_checkpointing": True, "max_epochs": 3}
    return learn(module, Resumable(2), callback, folder, [*others, saving(folder)], **options)


def assert_resumed(module, callback, made, whole, uninterrupted, first):
    """Model, optimizer, Ω and θ*, bit for bit."""
    assert_same(module.state_dict(), whole.state_dict(), 0, 0)
    ours, theirs = (t.optimizers[0].state_dict()["state"] for t in (made, first))
    for index, state in theirs.items():
        assert_same(ours[index], state, 0, 0)
    assert_same(callback.mas.importance, uninterrupted.mas.importance, 0, 0)
    assert_same(callback.mas.anchor, uninterrupted.mas.anchor, 0, 0)
    assert callback.mas.num_tasks == 2


@pytest.mark.parametrize("step", [8, 10, 15], ids=["mid-epoch", "between epochs", "at the end"])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_fit_resumed_from_its_checkpoint_ends_in_the_same_bits(tmp_path, mode, step):
    whole, uninterrupted = Classifier(momentum=0.9), MASCallback(20.0, mode=mode)
    first = second_task(whole, uninterrupted, tmp_path / "whole")
    folder = tmp_path / "whole"
    if step == 8:
        folder = tmp_path / "part"
        with pytest.raises(RuntimeError, match="killed"):
            second_task(Classifier(momentum=0.9), MASCallback(20.0, mode=mode), folder, [Death()])
    # Nothing but a file is left of it: another module, another callback.
    module, callback = Classifier(seed=7, momentum=0.9), MASCallback(mode=mode)
    made = learn(
        module, Resumable(2), callback, folder, path=str(folder / f"step={step}.ckpt"), max_epochs=3
    )
    assert_resumed(module, callback, made, whole, uninterrupted, first)
    assert callback.mas.lambda_reg == 20.0


def test_a_checkpoint_from_after_fit_has_the_tasks_end(tmp_path):
    module, callback = Classifier(), MASCallback(2.0)
    made = learn(module, batches(1), callback, tmp_path)
    made.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    again = MASCallback()
    learn(Classifier(seed=7), batches(1), again, tmp_path, path=str(tmp_path / "end.ckpt"))
    assert again.mas.num_tasks == 1
    assert_same(again.mas.importance, callback.mas.importance, 0, 0)
    # Nothing in it that needs unpickling.
    kept = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["MASCallback"]
    mas = mas_ext.MAS(module)
    mas.load_state_dict(kept["mas"])
    assert_same(mas.importance, callback.mas.importance, 0, 0)


def test_a_state_of_another_model_is_refused(tmp_path):
    callback, other = MASCallback(), MASCallback(params=["*.weight"])
    learn(Classifier(), batches(1), callback, tmp_path)
    learn(Classifier(), batches(1), other, tmp_path)
    before = {name: omega.clone() for name, omega in other.mas.importance.items()}
    other.load_state_dict({"mas": {**unpacked(callback.mas.state_dict()), "num_tasks": None}})
    with pytest.raises(ValueError, match="the state is damaged: 'num_tasks' is None"):
        learn(Classifier(), batches(1), other, tmp_path)
    assert_same(other.mas.importance, before, 0, 0)


# -- arguments -------------------------------------------------------------------------------------


def test_before_the_first_fit_there_is_nothing():
    callback = MASCallback()
    assert callback.mas is None
    assert callback.state_dict() == {}
    with pytest.raises(RuntimeError, match="before the first training: there is no model yet"):
        callback.consolidate([torch.zeros(1, 6)])


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "mas_ext.integrations.lightning")
    with pytest.raises(ImportError, match=r"needs lightning .*pip install 'mas_ext\[lightning"):
        importlib.import_module("mas_ext.integrations.lightning")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_reg": -1}, ValueError, "lambda_reg is -1"),
        ({"mode": "both"}, ValueError, "mode: 'both' is unknown"),
        ({"samples": 3}, TypeError, "'samples' is no option; use .*max_samples"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        MASCallback(**options)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield from vectors(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(Endless(), batch_size=4), "has no length.*pass max_samples=, or consolidate="),
        ({"a": batches(1), "b": batches(2)}, "several dataloaders.*pass consolidate=False"),
    ],
    ids=["endless", "several"],
)
def test_data_that_could_not_be_measured_is_refused_before_training(tmp_path, data, message):
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        learn(module, data, MASCallback(), tmp_path)
    assert_same(module.state_dict(), before, 0, 0)
