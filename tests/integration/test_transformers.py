"""What only the Trainer of transformers has: Accelerate, columns and labels, its folders."""

import copy

import pytest
import torch

pytest.importorskip("accelerate", reason="needs mas_ext[transformers]")
pytest.importorskip("transformers", reason="needs mas_ext[transformers]")
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

import mas_ext
from mas_ext.integrations.transformers import FILE, MASCallback
from tests.support.hand_loop import HandLoop, Protection, sgd
from tests.support.oracle import assert_exact, one_by_one
from tests.support.regularizers import assert_refused, assert_states_equal, refusal
from tests.support.trainers import Transformers, batches, loss_of, vectors
from tests.support.zoo import models as zoo
from tests.support.zoo.small import assert_same

X = vectors(1)[0]


@pytest.fixture
def library():
    return Transformers()


def llama():
    torch.manual_seed(0)
    return zoo.transformer("LlamaForCausalLM", zoo.GROUPED, attention_dropout=0.1)


def texts(seed, count=12):
    tokens = torch.randint(19, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


def measured(model):
    mas = mas_ext.MAS(model, 2.0)
    mas.consolidate([{"x": X}])
    return mas


def test_accelerate_without_a_trainer(library):
    """Once every three batches, after its clipping: attach finds the optimizer in the wrapper."""
    model = library.model()
    mas = measured(model)
    hand = HandLoop(model, Protection.of(mas), sgd(1.0, 0.0))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    wrapped = accelerator.prepare(torch.optim.SGD(model.parameters(), 1.0))
    mas.attach(wrapped)
    data = [*batches(1), *batches(2)][:6]
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            wrapped.step()
            wrapped.zero_grad()
    for part in (data[:3], data[3:]):
        hand.step([lambda m, b=b: loss_of(m, b) for b in part], clip=0.05)
    assert hand.penalties[-1] > 1e-6
    assert_same(dict(model.named_parameters()), hand.theta)


def test_an_optimizer_that_has_the_penalty_is_not_given_it_twice(library, tmp_path):
    runs = []
    for is_ours in (True, False):
        model, recorder = library.model(), library.Recorder()
        mas = measured(model)
        callback = MASCallback(mas=mas, consolidate=False)
        optimizer = mas_ext.optim.SGD(model.parameters(), 0.05, mas=mas) if is_ours else None
        options = {"optimizer": optimizer, "lr": 0.05, "others": [recorder]}
        library.learn(model, library.data(2), callback, tmp_path, **options)
        runs.append((model, recorder.logged))
    assert_same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-12)
    assert runs[0][1][-1] > 1e-4


def test_labels_of_any_name_and_columns_of_compute_loss_stay_out(library, tmp_path):
    class Spans(type(library.model())):
        def forward(self, x, start_positions=None, answer=None):
            assert start_positions is None or self.training, "labels while measuring"
            return super().forward(x, start_positions)

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs.pop("id")
            return model(**inputs)["loss"]

    rows = [
        {"x": row["x"], "start_positions": row["labels"], "answer": row["labels"], "id": 7}
        for row in library.data(1)
    ]
    model, callback = Spans(), MASCallback()
    options = {"trainer": Own, "label_names": ["start_positions", "answer"]}
    library.learn(model, rows, callback, tmp_path, **options)
    expected = one_by_one(model, [X], forward=lambda m, x: m.body(x))
    assert_exact(callback.mas.importance, expected)


def test_a_language_model_is_measured_exactly_and_stays_in_training_mode(library, tmp_path):
    model, callback = llama().double(), MASCallback()
    library.learn(model, texts(1), callback, tmp_path, lr=0.01)
    assert model.training, "as the Trainer left it"
    inputs = torch.stack([row["input_ids"] for row in texts(1)])
    expected = one_by_one(copy.deepcopy(model), [{"input_ids": inputs}])
    assert_exact(callback.mas.importance, expected)


@pytest.mark.parametrize("adapters", ["separate", "merged"])
def test_only_the_adapters_of_a_peft_model(library, tmp_path, adapters):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, callback = peft.get_peft_model(llama(), config), MASCallback(adapters=adapters)
    recorder = library.Recorder()
    options = {"max_steps": 2, "others": [recorder]}
    library.learn(model, texts(1), callback, tmp_path, **options)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    if adapters == "merged":
        trained = {n for n, _ in llama().named_parameters() if "q_proj" in n}
    assert set(callback.mas.importance) == trained
    library.learn(model, texts(2), callback, tmp_path, **options)
    assert recorder.logged[-1] > 0


def test_adapters_held_as_one_update_resume_in_bfloat16(library, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"bf16": True, "accumulate": 2, "saves": True, "save_steps": 2, "lr": 0.05}

    def learn(folder, **more):
        model = peft.get_peft_model(llama(), config)
        budget = mas_ext.DriftBudget(1e-4, every=1)
        mas = mas_ext.MAS(model, budget=budget, adapters="merged")
        mas.consolidate([{"input_ids": row["input_ids"][None]} for row in texts(1)])
        callback, recorder = MASCallback(mas=mas, consolidate=False), library.Recorder()
        options["others"] = [recorder]
        library.learn(model, texts(2), callback, folder, **options, **more)
        return model, mas, recorder.logged

    model, mas, logged = learn(tmp_path / "whole")
    assert logged[-1] > 0
    learn(tmp_path / "parts", max_steps=2)
    again, resumed, _ = learn(tmp_path / "parts", resume=True)
    assert_states_equal(again.state_dict(), model.state_dict())
    assert_states_equal(resumed.state_dict(), mas.state_dict())


def test_the_drift_is_that_without_the_trainers_autocast(library, tmp_path):
    model = llama()
    mas = mas_ext.L2SP(model, budget=0.1)
    mas.consolidate([{"input_ids": row["input_ids"][None]} for row in texts(1)])
    before = mas.drift_measured()
    library.learn(model, texts(2), library.Recorder(), tmp_path, max_steps=1, lr=0.0, bf16=True)
    assert mas.drift_measured() == before


# -- Folders that training resumes from ------------------------------------------------------------
SAVING = {"saves": True, "save_steps": 5, "lr": 0.05, "momentum": 0.9}


def test_resuming_from_a_folder_elsewhere(library, tmp_path):
    uninterrupted, whole = MASCallback(20.0), library.model(dropout=0.5)
    library.learn(whole, library.data(2), uninterrupted, tmp_path / "b", **SAVING)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "b/checkpoint-5").rename(elsewhere)
    # In the way: a checkpoint of the same step, of another training.
    options = {**SAVING, "max_steps": 5}
    library.learn(library.model(3), library.data(4), MASCallback(), tmp_path / "b", **options)
    resume = {"resume": str(elsewhere), **SAVING}
    again, callback = library.model(7, 0.5), MASCallback(resume_from_checkpoint=str(elsewhere))

    def learn(callback):
        return library.learn(again, library.data(2), callback, tmp_path / "b", **resume)

    case = refusal(learn, ValueError, "resume_from_checkpoint", "step 5", "MASCallback")
    assert_refused(case, MASCallback())
    learn(callback)
    assert_states_equal(again.state_dict(), whole.state_dict())
    assert_states_equal(callback.mas.state_dict(), uninterrupted.mas.state_dict())


def test_a_checkpoint_without_a_state_is_refused(library, tmp_path):
    library.learn(library.model(), library.data(1), TrainerCallback(), tmp_path, **SAVING)

    def resume():
        options = {**SAVING, "resume": True}
        library.learn(library.model(), library.data(1), MASCallback(), tmp_path, **options)

    assert_refused(refusal(resume, ValueError, "checkpoint-10", FILE, "mas.save()"))
