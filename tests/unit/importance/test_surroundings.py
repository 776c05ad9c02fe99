"""Exact importance inside whatever surrounds a model, which must not notice: compilers, autocast,
checkpointing, hooks, a training run, and a measurement that is interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mas_ext import MAS, estimate_importance
from tests.support.oracle import assert_exact, one_by_one, refused_or
from tests.support.regularizers import assert_states_equal
from tests.support.unchanged import snapshot, used_model
from tests.support.zoo.layers import tied_language_model
from tests.support.zoo.models import encoder
from tests.support.zoo.small import convnet, images, mlp, vectors

PAIRS = pytest.mark.parametrize(("make", "data"), [(mlp, vectors), (convnet, images)])


# -- What is left as it was ------------------------------------------------------------------------
def fails_half_way() -> Iterator[Tensor]:
    yield images(3)
    raise OSError("the disk is gone")


@pytest.mark.filterwarnings("ignore:estimator='local':UserWarning")
@pytest.mark.parametrize("estimator", ["per_sample", "batch", "local"])
def test_everything_is_put_back(estimator):
    model = used_model()
    before = snapshot(model)
    loader = torch.utils.data.DataLoader(images(), batch_size=2, shuffle=True)
    estimate_importance(model, loader, estimator=estimator)
    assert_states_equal(snapshot(model), before)
    with pytest.raises(OSError, match="the disk is gone"):
        estimate_importance(model, fails_half_way(), estimator=estimator)
    assert_states_equal(snapshot(model), before)


class Merging(nn.Linear):
    """As in LoRA layers, the weights change with the mode."""

    def train(self, mode=True):
        with torch.no_grad():
            self.weight.mul_(2 if mode else 0.5)
        return super().train(mode)


def test_modules_are_not_told_of_the_mode():
    model = Merging(6, 3).double()
    before = snapshot(model)
    estimate_importance(model, [vectors()])
    assert_states_equal(snapshot(model), before)


def test_nothing_is_accumulated_into_gradients():
    """A hook after accumulation is how an optimizer steps within backward: it must not run."""
    model, seen = mlp(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(seen.append)
    estimate_importance(model, [vectors()])
    assert not seen
    assert all(p.grad is None for p in model.parameters())


# -- Compilers -------------------------------------------------------------------------------------
def whole(model: nn.Module, backend: str) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def a_part(model: nn.Module, backend: str) -> nn.Module:
    model[0].compile(backend=backend)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", [whole, in_place, a_part])
@PAIRS
def test_compiled_models(make, data, how, backend):
    torch.compiler.reset()
    model, x = make(), data()
    expected = one_by_one(model, [x])
    compiled = how(model, backend)
    with torch.no_grad():
        compiled(x)  # compiled before, without gradients, in evaluation mode
    assert_exact(estimate_importance(compiled, x.split(4)), expected)


def test_a_compiled_model_in_a_custom_forward():
    """A compiled backward may refuse to run twice on one graph."""
    torch.compiler.reset()
    model, x = convnet(), images()
    expected = one_by_one(model, [x])
    compiled = torch.compile(model, backend="aot_eager")
    batches = [(0, x[:4]), (1, x[4:])]
    with refused_or("donated_buffer=False"):
        omega = estimate_importance(compiled, batches, forward=lambda m, b: m(b[1]))
        assert_exact(omega, expected)


# -- Modes of the caller ---------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_in_any_gradient_mode(mode):
    model = convnet()
    expected = one_by_one(model, [images()])
    with mode():
        omega = estimate_importance(model, images().split(4))
        made_inside = estimate_importance(model, (images() for _ in range(1)))
    assert_exact(omega, expected)
    assert_exact(made_inside, expected)


@contextmanager
def bfloat16() -> Iterator[None]:
    """Without oneDNN where the CPU has no bfloat16: its LSTM fails there, torch's own does not."""
    onednn = torch.backends.mkldnn.flags(enabled=torch.ops.mkldnn._is_mkldnn_bf16_supported())
    with onednn, torch.autocast("cpu", torch.bfloat16):
        yield


AUTOCAST: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": lambda: (mlp(), vectors()),
    "cnn": lambda: (convnet(), images()),
    "encoder": lambda: (encoder(True), torch.randn(6, 5, 8)),
    "tied": lambda: (tied_language_model(9, 4), torch.randint(9, (6, 5))),
    "lstm": lambda: (nn.LSTM(6, 4, batch_first=True), torch.randn(6, 5, 6)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the forward"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast_the_sums_are_float32(name, inside):
    model, x = AUTOCAST[name]()
    model, x = model.float(), x.float() if x.is_floating_point() else x

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with bfloat16() if inside else nullcontext():
            output = model(batch)
        return output[0] if isinstance(output, tuple) else output

    context = nullcontext if inside else bfloat16
    expected = one_by_one(
        model, [x], lambda y: y.float().square().flatten(1).sum(1), forward, context
    )
    with context():
        omega = estimate_importance(model, x.split(4), forward=forward)
    assert {value.dtype for value in omega.values()} == {torch.float32}
    assert_exact(omega, expected, rtol=0.05, floor=0.005)


# -- Checkpointing and saved tensors ---------------------------------------------------------------
class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, nested: bool = False, first_too: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.reentrant, self.nested, self.first_too = reentrant, nested, first_too
        self.double()

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x):
        first, second, third, last = self.blocks
        x = self.run(first, x) if self.first_too else first(x)
        if self.nested:
            x = self.run(lambda y: third(self.run(second, y)), x)
        else:
            x = self.run(third, self.run(second, x))
        return last(x)


def run_blocks(model: Checkpointed, x: Tensor) -> Tensor:
    return nn.Sequential(*model.blocks)(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("first_too", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, nested, first_too):
    """Reentrant, its graph is hidden, and it refuses to compute particular gradients."""
    model, x = Checkpointed(reentrant, nested, first_too), vectors()
    expected = one_by_one(model, [x], forward=run_blocks)
    with refused_or("reentrant") if reentrant else nullcontext():
        assert_exact(estimate_importance(model, x.split(4)), expected)


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the forward"])
@PAIRS
def test_saved_tensors_kept_elsewhere(make, data, inside):
    model, x = make(), data()
    expected = one_by_one(model, [x])

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu() if inside else nullcontext():
            return model(batch)

    with nullcontext() if inside else torch.autograd.graph.save_on_cpu():
        assert_exact(estimate_importance(model, x.split(4), forward=forward), expected)
        if not inside:
            assert_exact(estimate_importance(model, x.split(4)), expected)


# -- Warnings --------------------------------------------------------------------------------------
def stacked(model: nn.Module, samples: list[Tensor]) -> Tensor:
    """A forward for batches that cannot be cut."""
    return model(torch.stack(samples))


def test_slowness_is_warned_of_once_at_the_caller():
    model, data = mlp(), [list(vectors()), list(vectors())]
    with pytest.warns(UserWarning, match="one sample at a time") as warned:
        estimate_importance(model, data, forward=stacked)
    with pytest.warns(UserWarning, match="one sample at a time") as warned_by_mas:
        MAS(model).update_importance(data, forward=stacked)
    assert [w.filename for w in (*warned, *warned_by_mas)] == [__file__] * 2


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_stays_what_it_is():
    with pytest.raises(UserWarning, match="one sample at a time"):
        estimate_importance(mlp(), [list(vectors())], forward=stacked)


# -- Hooks -----------------------------------------------------------------------------------------
def counting(seen: list, result: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
    def hook(*arguments: Any) -> Any:
        seen.append(1)
        return result(*arguments)

    return hook


HOOKS: dict[str, Callable[[nn.Module, list], Any]] = {
    "forward pre": lambda m, seen: m.register_forward_pre_hook(
        counting(seen, lambda _, inputs: (inputs[0] * 2,))
    ),
    "forward": lambda m, seen: m.register_forward_hook(
        counting(seen, lambda _, inputs, output: output + inputs[0].sum(1, keepdim=True))
    ),
    "backward": lambda m, seen: m.register_full_backward_hook(counting(seen)),
    "backward, changing": lambda m, seen: m.register_full_backward_hook(
        counting(seen, lambda _, inward, outward: (inward[0] * 3,))
    ),
    "backward pre, changing": lambda m, seen: m.register_full_backward_pre_hook(
        counting(seen, lambda _, outward: (outward[0] * 3,))
    ),
    "on the output": lambda m, seen: m.register_forward_hook(
        lambda _, inputs, output: output.register_hook(counting(seen, lambda g: g * 3)) and None
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_run_and_stay(name):
    model, x, seen = mlp(), vectors(), []
    HOOKS[name](model[2], seen)
    expected = one_by_one(model, [x])
    before = {k: len(v) for k, v in vars(model[2]).items() if "hooks" in k}
    seen.clear()
    assert_exact(estimate_importance(model, x.split(4)), expected)
    assert seen
    assert {k: len(v) for k, v in vars(model[2]).items() if "hooks" in k} == before


# -- A training run must not notice ----------------------------------------------------------------
def trainee() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))


def train(measure_at: str | None, context: Callable[[], AbstractContextManager]) -> list[Any]:
    """Three steps with two gradients each; what is left at the end of every step."""
    model = trainee()
    mas = MAS(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = images(dtype=torch.float32)
    loader = torch.utils.data.DataLoader(x, batch_size=4, shuffle=True)
    history = []

    def pause(where: str) -> None:
        if where == measure_at:
            mas.update_importance(loader)

    for _ in range(3):
        with context():
            pause("before the forward")
            loss = model(x).square().mean()
            pause("between forward and backward")
            loss.backward()
            pause("between two backwards")
            model(x).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            pause("after the step")
        left = [model.state_dict(), optimizer.state_dict(), float(loss.detach()), snapshot(model)]
        # Gradients by value: the tensors of another model have other identities.
        del left[-1]["gradients"], left[-1]["buffers"]
        history.append(copy.deepcopy(left))
    return history


MOMENTS = [
    "before the forward",
    "between forward and backward",
    "between two backwards",
    "after the step",
]


@pytest.mark.parametrize("context", [nullcontext, bfloat16])
@pytest.mark.parametrize("moment", MOMENTS)
def test_training_goes_on_bit_for_bit(moment, context):
    assert_states_equal(train(moment, context), train(None, context))


# -- Interruption ----------------------------------------------------------------------------------
def states_between(mas: MAS, batches: list[Tensor], where: str) -> list[Any]:
    """The states that a program could have saved after each batch but the last."""
    states: list[Any] = []

    def data() -> Iterator[Tensor]:
        for k, batch in enumerate(batches):
            if where == "generator" and k > 0:
                states.append(mas.state_dict())
            yield batch

    def progress(done: int) -> None:
        if where == "progress":
            states.append(mas.state_dict())

    mas.update_importance(data(), progress=progress)
    return states[: len(batches) - 1]


@pytest.mark.parametrize("where", ["generator", "progress"])
@pytest.mark.parametrize("earlier", [False, True], ids=["", "measured before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_interrupted_measurement_goes_on_from_its_state(where, earlier, dtype):
    """A state taken between two batches, loaded anew, and the rest of the data: the same bits."""
    model, x = convnet(dtype), images(17, dtype)
    batches = list(x.split([5, 1, 4, 5, 2]))
    uninterrupted = MAS(model)
    if earlier:
        uninterrupted.update_importance([x[:3]])
    states = states_between(uninterrupted, batches, where)
    assert len(states) == len(batches) - 1
    for done, state in enumerate(states, 1):
        resumed = MAS(model)
        resumed.load_state_dict(state)
        resumed.update_importance(batches[done:])
        assert_states_equal(resumed.state_dict(), uninterrupted.state_dict())
