"""What only Lightning's Trainer has: manual optimization, half precision, its checkpoints."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

import mas_ext
from tests.support.hand_loop import HandLoop, Protection, sgd
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import assert_refused, assert_states_equal, plain_state, refusal
from tests.support.trainers import EPOCHS, Lightning, batches, loss_of, vectors
from tests.support.zoo.small import assert_same

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*ckpt_path"
)
X = vectors(1)[0]


@pytest.fixture(scope="module")
def library():
    return Lightning()


def test_manual_optimization_with_two_optimizers(library, tmp_path):
    class ByItself(library.Module):
        """An optimizer for each layer."""

        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss_of(self, batch))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.body[k].parameters(), self.lr) for k in (0, 3)]

    module, callback = ByItself(0, 0.0, torch.float64), library.MASCallback(5.0)
    recorder = library.Recorder()
    library.learn(module, library.data(1), callback, tmp_path)
    hand = HandLoop(module, Protection.of(callback.mas), sgd(0.5, 0.0))
    library.learn(module, library.data(2), callback, tmp_path, others=[recorder])
    for batch in EPOCHS * batches(2):
        hand.step([lambda m, b=batch: loss_of(m, b)])
    assert_same(dict(module.named_parameters()), hand.theta)
    assert recorder.logged == pytest.approx(hand.penalties, rel=1e-6)
    assert max(hand.penalties) > 1e-6


def test_a_part_of_an_epoch_and_a_part_of_the_module(library, tmp_path):
    module = library.model()
    mas = mas_ext.MAS(module.body, 2.0, params=["3.*"])
    callback = library.MASCallback(mas=mas)
    library.learn(module, library.data(1), callback, tmp_path, limit_train_batches=3)
    assert callback.mas is mas
    expected = one_by_one(module.body, [X[:12]])
    assert_exact(mas.importance, {n: o for n, o in expected.items() if n.startswith("3.")})


def test_in_true_half_precision_the_inputs_are_too(library, tmp_path):
    module, callback = library.model(dtype=torch.bfloat16), library.MASCallback()
    library.learn(module, library.data(1), callback, tmp_path, precision="bf16-true")
    x = X.to(torch.bfloat16)
    assert_same(callback.mas.importance, mas_ext.estimate_importance(module, x.split(4)), 0, 0)


@pytest.mark.parametrize("average", [StochasticWeightAveraging, EMAWeightAveraging])
def test_averaged_weights_are_measured_or_refused(library, tmp_path, average):
    made = {StochasticWeightAveraging: {"swa_lrs": 0.1}, EMAWeightAveraging: {"decay": 0.5}}
    module, callback = library.model(), library.MASCallback()
    others = [average(**made[average])]
    with pytest.raises(ValueError, match=f"{average.__name__}.*put MASCallback after"):
        library.learn(module, library.data(1), callback, tmp_path, others=others)
    trainer = lightning.Trainer(
        callbacks=[average(**made[average]), callback], max_epochs=EPOCHS, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, library.data(1))
    assert_same(dict(module.named_parameters()), dict(callback.mas.anchor), 0, 0)


def test_what_has_not_trained_does_not_end_a_task(library, tmp_path):
    module, callback = library.model(), library.MASCallback()
    made = library.learn(module, library.data(1), callback, tmp_path)
    made.fit(module, library.data(1))  # its epochs are over
    assert callback.mas.num_tasks == 1


def test_a_checkpoint_from_after_fit_has_the_tasks_end(library, tmp_path):
    module, callback = library.model(), library.MASCallback(2.0)
    made = library.learn(module, library.data(1), callback, tmp_path)
    assert library.MASCallback().state_dict() == {}
    made.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    again, resume = library.MASCallback(), str(tmp_path / "end.ckpt")
    library.learn(library.model(7), library.data(1), again, tmp_path, resume=resume)
    assert again.mas.num_tasks == 1
    assert_same(again.mas.importance, callback.mas.importance, 0, 0)
    # Nothing in it that needs unpickling.
    found = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["MASCallback"]
    mas = mas_ext.MAS(module)
    mas.load_state_dict(found["mas"])
    assert_states_equal(mas.state_dict(), callback.mas.state_dict())


def test_a_damaged_state_is_refused(library, tmp_path):
    callback = library.MASCallback()
    library.learn(library.model(), library.data(1), callback, tmp_path)
    callback.load_state_dict({"mas": {**plain_state(callback.mas), "num_tasks": None}})

    def learn():
        library.learn(library.model(), library.data(1), callback, tmp_path)

    assert_refused(refusal(learn, ValueError, "damaged", "num_tasks"), unchanged=(callback.mas,))


def test_several_dataloaders_are_refused_before_training(library, tmp_path):
    module, data = library.model(), {"a": library.data(1), "b": library.data(2)}
    case = refusal(
        lambda: library.learn(module, data, library.MASCallback(), tmp_path),
        ValueError,
        "dataloaders",
        "consolidate=False",
    )
    assert_refused(case, unchanged=(module,))
