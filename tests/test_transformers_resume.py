"""Trainings that stop in the middle, and go on from the Trainer's checkpoints to the same bits."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs mas_ext[transformers]")
pytest.importorskip("transformers", reason="needs mas_ext[transformers]")
from transformers import TrainerCallback

from mas_ext._state import checkpoint
from mas_ext.integrations.transformers import FILE, MASCallback
from tests.models import assert_same
from tests.trainer import learn, llama, texts


class Death(TrainerCallback):
    """Ends a training in the middle, after the checkpoint of step 5."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt


def second_task(model, callback, folder, **options):
    learn(model, texts(1), callback, folder / "a", max_steps=4)
    return learn(model, texts(2), callback, folder / "b", **options)


def assert_resumed(trainer, callback, whole, uninterrupted):
    """Model, optimizer, Ω and θ*, bit for bit."""
    assert_same(trainer.model.state_dict(), whole.model.state_dict(), 0, 0)
    ours, theirs = (t.optimizer.state_dict()["state"] for t in (trainer, whole))
    for index, state in theirs.items():
        assert_same(ours[index], state, 0, 0)
    assert_same(callback.mas.importance, uninterrupted.mas.importance, 0, 0)
    assert_same(callback.mas.anchor, uninterrupted.mas.anchor, 0, 0)
    penalties = [[e.get("mas_penalty") for e in t.state.log_history] for t in (trainer, whole)]
    assert penalties[0] == penalties[1]
    assert callback.mas.num_tasks == 2


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_training_resumed_from_its_checkpoint_ends_in_the_same_bits(tmp_path, mode):
    options = {"mode": mode, "max_samples": 10}
    saving = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 1}
    uninterrupted = MASCallback(20.0, **options)
    whole = second_task(llama(), uninterrupted, tmp_path / "whole", **saving)

    with pytest.raises(KeyboardInterrupt):
        second_task(
            llama(), MASCallback(20.0, **options), tmp_path / "part", others=[Death()], **saving
        )
    # Nothing but the folder is left of it: another model, another callback.
    callback = MASCallback(**options)
    trainer = learn(llama(7), texts(2), callback, tmp_path / "part/b", resume=True, **saving)
    assert_resumed(trainer, callback, whole, uninterrupted)
    assert callback.mas.lambda_reg == 20.0


class Kill(TrainerCallback):
    """The process ends where it stands."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)


def in_a_process_of_its_own(folder, kill=False, resume=False):
    """Both tasks, or what is left of the second; keeps the model and the state."""
    saving = {"save_strategy": "steps", "save_steps": 5, "others": [Kill()] if kill else []}
    if resume:
        model, callback = llama(7), MASCallback()
        learn(model, texts(2), callback, Path(folder, "b"), resume=True, **saving)
    else:
        model, callback = llama(), MASCallback(20.0)
        second_task(model, callback, Path(folder), **saving)
    torch.save(model.state_dict(), Path(folder, "model.pt"))
    callback.mas.save(Path(folder, "mas.safetensors"))


@pytest.mark.slow
def test_a_killed_process_resumed_in_another_ends_in_the_same_bits(tmp_path):
    for folder, how, code in [
        ("whole", "", 0),
        ("part", "kill=True", -signal.SIGKILL),
        ("part", "resume=True", 0),
    ]:
        call = f"in_a_process_of_its_own({str(tmp_path / folder)!r}, {how})"
        program = f"from tests.test_transformers_resume import *; {call}"
        assert subprocess.run([sys.executable, "-c", program], timeout=600).returncode == code
    states = [
        torch.load(tmp_path / folder / "model.pt", weights_only=True)
        for folder in ("whole", "part")
    ]
    assert_same(states[1], states[0], 0, 0)
    states = [
        checkpoint.read(tmp_path / folder / "mas.safetensors") for folder in ("whole", "part")
    ]
    for group in checkpoint.GROUPS:
        assert_same(states[1][group], states[0][group], 0, 0)


def test_resuming_from_a_folder_elsewhere(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    uninterrupted = MASCallback(20.0)
    whole = second_task(llama(), uninterrupted, tmp_path, **saving)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "b/checkpoint-5").rename(elsewhere)
    # In the way: a checkpoint of the same step, of another training.
    learn(llama(3), texts(4), MASCallback(), tmp_path / "b", **{**saving, "max_steps": 5})
    resume = {"resume": str(elsewhere), **saving}
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .* at step 5 .*pass it to MASC"):
        learn(llama(7), texts(2), MASCallback(), tmp_path / "b", **resume)
    callback = MASCallback(resume_from_checkpoint=str(elsewhere))
    trainer = learn(llama(7), texts(2), callback, tmp_path / "b", **resume)
    assert_resumed(trainer, callback, whole, uninterrupted)


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    learn(llama(), texts(1), TrainerCallback(), tmp_path, **saving)
    with pytest.raises(ValueError, match=f"checkpoint-12 has no {FILE}; it was made without"):
        learn(llama(), texts(1), MASCallback(), tmp_path, resume=True, **saving)
