"""transformers' own Trainer on small random models: against loops by hand, and its tasks' ends."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="needs mas_ext[transformers]")
pytest.importorskip("transformers", reason="needs mas_ext[transformers]")
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import mas_ext
from mas_ext._state.distributed_checkpoint import unpacked
from mas_ext.integrations.transformers import MASCallback
from tests.hand_loop import ByHand
from tests.models import assert_same
from tests.oracle import assert_exact, one_by_one
from tests.trainer import Classifier, arguments, learn, llama, texts, vectors


class Recorder(TrainerCallback):
    """What callbacks that come later are given to log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


class Recording(Trainer):
    """With a loss of its own, which takes a column that the model does not know."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.__dict__.setdefault("batches", []).append(dict(inputs))
        return weighted_loss(model, inputs)


def weighted_loss(model, batch):
    losses = nn.functional.cross_entropy(
        model(batch["x"])["logits"], batch["labels"], reduction="none"
    )
    return (losses * batch["weight"].sigmoid()).mean()


# -- the loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_trainer_is_the_loop_by_hand(tmp_path, mode, accumulate):
    lambda_reg, lr, most = 5.0, 0.5, 0.02
    model, callback, recorder = Classifier(), MASCallback(lambda_reg, mode=mode), Recorder()
    learn(model, vectors(1), callback, tmp_path)
    hand = ByHand(model, callback.mas.importance, lambda_reg)
    trainer = learn(
        model,
        [{**row, "weight": row["x"].sum()} for row in vectors(2)],
        callback,
        tmp_path,
        trainer=Recording,
        others=[recorder],
        gradient_accumulation_steps=accumulate,
        max_grad_norm=most,
        optimizers=(torch.optim.SGD(model.parameters(), lr), None),
        lr_scheduler_type="constant",
        logging_steps=1,
    )

    optimizer = torch.optim.SGD(hand.model.parameters(), lr)
    epochs = [trainer.batches[:5], trainer.batches[5:]]
    for part in [e[k : k + accumulate] for e in epochs for k in range(0, 5, accumulate)]:
        optimizer.zero_grad()
        for batch in part:
            (weighted_loss(hand.model, batch) / len(part)).backward()
        norm = nn.utils.clip_grad_norm_(hand.model.parameters(), most)
        assert norm > most, "nothing was clipped"
        hand.before_step(mode)
        optimizer.step()
        hand.after_step(mode, lr)

    assert_same(dict(model.named_parameters()), dict(hand.model.named_parameters()))
    assert max(hand.penalties) > 1e-6
    for logs in (trainer.state.log_history, recorder.logs):
        logged = [entry["mas_penalty"] for entry in logs if "loss" in entry]
        assert logged == pytest.approx(hand.penalties, rel=1e-12)


def test_before_the_first_task_a_trainer_trains_as_without(tmp_path):
    models = Classifier(), Classifier()
    learn(models[0], vectors(1), TrainerCallback(), tmp_path)
    trainer = learn(models[1], vectors(1), MASCallback(100.0), tmp_path)
    assert_same(models[1].state_dict(), models[0].state_dict(), 0, 0)
    assert not any("mas_penalty" in entry for entry in trainer.state.log_history)


def test_accelerate_without_a_trainer():
    """Once every three batches, after its clipping: attach finds the optimizer in the wrapper."""
    model = Classifier()
    mas = mas_ext.MAS(model, 2.0)
    mas.consolidate([{"x": torch.stack([row["x"] for row in vectors(1)])}])
    hand = ByHand(model, mas.importance, 2.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    wrapped = accelerator.prepare(torch.optim.SGD(model.parameters(), 1.0))
    mas.attach(wrapped)
    optimizer = torch.optim.SGD(hand.model.parameters(), 1.0)
    batches = [
        {key: torch.stack([row[key] for row in vectors(seed)]) for key in ("x", "labels")}
        for seed in range(6)
    ]
    for k, batch in enumerate(batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            wrapped.step()
            wrapped.zero_grad()
        (hand.model(**batch)["loss"] / 3).backward()
        if k % 3 == 2:
            nn.utils.clip_grad_norm_(hand.model.parameters(), 0.05)
            hand.before_step("gradient")
            optimizer.step()
            optimizer.zero_grad()
    assert hand.penalties[-1] > 1e-6
    assert_same(dict(model.named_parameters()), dict(hand.model.named_parameters()))


def test_an_optimizer_that_has_the_penalty_is_not_given_it_twice(tmp_path):
    runs = []
    for own in (True, False):
        model = Classifier()
        mas = mas_ext.MAS(model, 2.0)
        mas.consolidate([{"x": torch.stack([row["x"] for row in vectors(1)])}])
        made = mas_ext.optim.SGD(model.parameters(), 0.05, mas=mas) if own else None
        optimizer = made or torch.optim.SGD(model.parameters(), 0.05)
        callback = MASCallback(mas=mas, consolidate=False)
        trainer = learn(model, vectors(2), callback, tmp_path, optimizers=(optimizer, None))
        runs.append((model, [e["mas_penalty"] for e in trainer.state.log_history if "loss" in e]))
    assert_same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-12)
    assert runs[0][1][-1] > 1e-4


# -- the end of a task -----------------------------------------------------------------------------


def test_the_end_of_training_measures_its_data_exactly(tmp_path):
    model, callback = llama().double(), MASCallback()
    learn(model, texts(1), callback, tmp_path)
    reference = copy.deepcopy(model)
    inputs = torch.stack([row["input_ids"] for row in texts(1)])
    assert_exact(callback.mas.importance, one_by_one(reference, [{"input_ids": inputs}]))
    assert_same(dict(callback.mas.anchor), dict(reference.named_parameters()), 0, 0)
    assert model.training, "as the Trainer left it"


def test_labels_of_any_name_and_columns_of_compute_loss_stay_out(tmp_path):
    class Spans(Classifier):
        def forward(self, x, start_positions=None, answer=None):
            assert start_positions is None or self.training, "labels while measuring"
            return super().forward(x, start_positions)

    rows = [
        {"x": row["x"], "start_positions": row["labels"], "answer": row["labels"], "id": 7}
        for row in vectors(1)
    ]

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("id")
            return model(**inputs)["loss"]

    model, callback = Spans(), MASCallback()
    names = ["start_positions", "answer"]
    learn(model, rows, callback, tmp_path, trainer=Own, label_names=names)
    x = torch.stack([row["x"] for row in rows])
    expected = one_by_one(model, [x], forward=lambda m, x: m.body(x))
    assert_exact(callback.mas.importance, expected)


def test_only_the_adapters_of_a_peft_model(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, callback = peft.get_peft_model(llama(), config), MASCallback()
    learn(model, texts(1), callback, tmp_path, max_steps=2)
    assert set(callback.mas.importance) == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert all("lora_" in name for name in callback.mas.importance)
    learned = learn(model, texts(2), callback, tmp_path, max_steps=2)
    assert learned.state.log_history[0]["mas_penalty"] > 0


def test_consolidating_by_hand(tmp_path):
    model, callback = Classifier(), MASCallback(consolidate=False, max_samples=8)
    learn(model, vectors(1), callback, tmp_path)
    assert callback.mas.num_tasks == 0
    x = torch.stack([row["x"] for row in vectors(1)])
    callback.consolidate([x], estimator="batch")
    expected = mas_ext.estimate_importance(model, [x], estimator="batch", max_samples=8)
    assert_same(callback.mas.importance, expected, 0, 0)


def test_further_options_reach_mas(tmp_path):
    model = Classifier()
    callback = MASCallback(
        0.5,
        merge="max",
        params=["body.2.*"],
        estimator="batch",
        objective="l1",
        max_samples=6,
        forward=lambda model, batch: model.body(batch["x"]),
    )
    learn(model, vectors(1), callback, tmp_path)
    assert repr(callback.mas).startswith("MAS(lambda_reg=0.5, merge='max'")
    assert set(callback.mas.importance) == {"body.2.weight", "body.2.bias"}
    assert set(unpacked(callback.mas.state_dict())["num_samples"]) == set()


def test_a_training_that_is_broken_off_leaves_nothing_behind(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    model, callback = Classifier(), MASCallback(2.0)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=vectors(1), callbacks=[callback])
    trainer.train()
    trainer.add_callback(Break())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Break)
    trainer.train()
    assert callback.mas.num_tasks == 2
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks


def test_a_model_that_was_made_anew_is_followed(tmp_path):
    model, callback = Classifier(), MASCallback(2.0)
    learn(model, vectors(1), callback, tmp_path)
    before = {name: omega.clone() for name, omega in callback.mas.importance.items()}
    again = copy.deepcopy(model)
    trainer = learn(again, vectors(2), callback, tmp_path, max_steps=2, others=[Recorder()])
    assert trainer.state.log_history[0]["mas_penalty"] > 0
    assert callback.mas.num_tasks == 2
    assert all((callback.mas.importance[n] >= before[n]).all() for n in before)


def test_a_state_that_was_kept_begins_the_next_task(tmp_path):
    model, callback = Classifier(), MASCallback(2.0)
    learn(model, vectors(1), callback, tmp_path)
    callback.mas.save(tmp_path / "mas.safetensors")
    models = model, copy.deepcopy(model)
    mas = mas_ext.MAS(models[1])
    mas.load(tmp_path / "mas.safetensors")
    for one, with_mas in zip(models, (callback, MASCallback(mas=mas)), strict=True):
        learn(one, vectors(2), with_mas, tmp_path)
    assert_same(models[1].state_dict(), models[0].state_dict(), 0, 0)
    assert_same(mas.importance, callback.mas.importance, 0, 0)


# -- arguments -------------------------------------------------------------------------------------


def test_before_the_first_training_there_is_nothing():
    callback = MASCallback()
    assert callback.mas is None
    with pytest.raises(RuntimeError, match="before the first training: there is no model yet"):
        callback.consolidate([torch.zeros(1, 6)])


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "mas_ext.integrations.transformers")
    with pytest.raises(ImportError, match=r"needs transformers .*pip install 'mas_ext\[transf"):
        importlib.import_module("mas_ext.integrations.transformers")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lambda_reg": -1}, ValueError, "lambda_reg is -1"),
        ({"merge": "median"}, ValueError, "merge: 'median' is unknown"),
        ({"mode": "both"}, ValueError, "mode: 'both' is unknown"),
        ({"estimator": "exact"}, ValueError, "estimator: 'exact' is unknown"),
        ({"training": True}, ValueError, "training: .*estimator='batch'"),
        ({"samples": 3}, TypeError, "'samples' is no option; use .*max_samples"),
        ({"mas": mas_ext.MAS(nn.Linear(1, 1)), "merge": "max"}, ValueError, "leave merge out"),
        ({"mas": mas_ext.MAS(nn.Linear(1, 1)), "lambda_reg": 1}, ValueError, "leave lambda_reg"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        MASCallback(**options)


def test_what_cannot_be_trained_is_refused_before_it_begins(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from vectors(1)

    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"has no length.*pass max_samples=, or consol"):
        learn(model, Endless(), MASCallback(), tmp_path, max_steps=4)
    other = MASCallback(mas=mas_ext.MAS(Classifier()))
    with pytest.raises(ValueError, match="holds none of this model's parameters"):
        learn(model, vectors(1), other, tmp_path)
    assert_same(model.state_dict(), before, 0, 0)
    learn(model, Endless(), MASCallback(max_samples=8), tmp_path, max_steps=4)
