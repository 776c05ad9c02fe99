"""Exact importance inside whatever surrounds a model: compilers, autocast, checkpointing, hooks, a
training run that must not notice, and a measurement that is interrupted.
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
from tests import layers, zoo
from tests.models import convnet, images, mlp, vectors
from tests.oracle import assert_exact, one_by_one, refused_or


# ================================================================================================
# Compilers
# ================================================================================================
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
@pytest.mark.parametrize(("make", "data"), [(mlp, vectors), (convnet, images)])
def test_compiled_models(make, data, in_place, backend):
    torch.compiler.reset()
    model, x = make(), data()
    expected = one_by_one(model, [x])
    if in_place:
        model.compile(backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)  # compiled before, without gradients, in evaluation mode
    assert_exact(estimate_importance(compiled, x.split(4)), expected)


def test_a_compiled_model_in_a_forward_of_the_users():
    """A compiled backward may refuse to run twice on one graph."""
    torch.compiler.reset()
    model, x = convnet(), images()
    expected = one_by_one(model, [x])
    compiled = torch.compile(model, backend="aot_eager")
    batches = [(0, x[:4]), (1, x[4:])]
    with refused_or("donated_buffer=False"):
        omega = estimate_importance(compiled, batches, forward=lambda m, b: m(b[1]))
        assert_exact(omega, expected)


def test_a_compiled_part():
    torch.compiler.reset()
    model, x = convnet(), images()
    expected = one_by_one(model, [x])
    model[0].compile(backend="aot_eager")
    assert_exact(estimate_importance(model, x.split(4)), expected)


# ================================================================================================
# Modes of the caller
# ================================================================================================
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


AUTOCAST = {
    "mlp": lambda: (mlp(), vectors()),
    "cnn": lambda: (convnet(), images()),
    "encoder": lambda: (zoo.encoder(True), torch.randn(6, 5, 8)),
    "tied": lambda: (layers.TiedLM(9, 4), torch.randint(9, (6, 5))),
    "lstm": lambda: (nn.LSTM(6, 4, batch_first=True), torch.randn(6, 5, 6)),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast_the_sums_are_float32(name):
    model, x = AUTOCAST[name]()
    model, x = model.float(), x.float() if x.is_floating_point() else x
    expected = one_by_one(
        model, [x], lambda y: y.float().square().flatten(1).sum(1), None, bfloat16
    )
    with bfloat16():
        omega = estimate_importance(model, x.split(4))
    assert {value.dtype for value in omega.values()} == {torch.float32}
    assert_exact(omega, expected, rtol=0.05, floor=0.005)


def test_autocast_inside_the_forward():
    model, x = mlp(torch.float32), vectors(dtype=torch.float32)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        with bfloat16():
            return model(batch)

    expected = one_by_one(model, [x], lambda y: y.float().square().sum(1), forward)
    assert_exact(estimate_importance(model, [x], forward=forward), expected, rtol=0.05)


OVERFLOWS = {
    "of the output": 1e5,
    "of the gradient": 4e4,  # the output still fits into float16, twice its value does not
}


@pytest.mark.parametrize("scale", OVERFLOWS.values(), ids=OVERFLOWS)
@pytest.mark.parametrize("first", [1.0, None], ids=["second batch", "first batch"])
def test_overflow_in_float16_is_an_error_that_changes_nothing(scale, first):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    mas = MAS(model)
    mas.update_importance([torch.ones(3, 2)])
    before = mas.state_dict()
    batches = [torch.full((4, 2), s / 4) for s in (first, scale) if s is not None]
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=r"'[01]\.weight'.*nothing was changed"),
    ):
        mas.update_importance(batches)
    assert_same_state(mas.state_dict(), before)


def assert_same_state(actual: Any, expected: Any) -> None:
    """Bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_state(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_state(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


# ================================================================================================
# Checkpointing and hooks on saved tensors
# ================================================================================================
class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, nested: bool = False, first_too: bool = True):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        self.how = {"use_reentrant": reentrant}
        self.nested, self.first_too = nested, first_too
        self.double()

    def run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return checkpoint(function, x, **self.how)

    def forward(self, x):
        x = self.run(self.blocks[0], x) if self.first_too else self.blocks[0](x)
        if self.nested:
            x = self.run(lambda y: self.blocks[2](self.run(self.blocks[1], y)), x)
        else:
            x = self.run(self.blocks[2], self.run(self.blocks[1], x))
        return self.blocks[3](x)


def plain(model: Checkpointed) -> nn.Module:
    return nn.ModuleDict({"blocks": model.blocks})


def run_blocks(model: nn.ModuleDict, x: Tensor) -> Tensor:
    return nn.Sequential(*model["blocks"])(x)


@pytest.mark.parametrize("nested", [False, True])
def test_checkpointing(nested):
    model, x = Checkpointed(reentrant=False, nested=nested), vectors()
    expected = one_by_one(plain(model), [x], forward=run_blocks)
    assert_exact(estimate_importance(model, x.split(4)), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("first_too", [False, True])
def test_reentrant_checkpointing_is_refused_or_exact(first_too, nested):
    """Its graph is hidden, and it refuses every backward that asks for particular gradients."""
    model = Checkpointed(reentrant=True, nested=nested, first_too=first_too)
    x = vectors()
    expected = one_by_one(plain(model), [x], forward=run_blocks)
    with refused_or("reentrant"):
        assert_exact(estimate_importance(model, x.split(4)), expected)


def stacked(model: nn.Module, samples: list[Tensor]) -> Tensor:
    """A forward for batches that are not known how to cut."""
    return model(torch.stack(samples))


def test_a_warning_points_at_the_caller():
    model, data = mlp(), [list(vectors())]
    with pytest.warns(UserWarning, match="one sample at a time") as warned:
        estimate_importance(model, data, forward=stacked)
    with pytest.warns(UserWarning, match="one sample at a time") as warned_by_mas:
        MAS(model).update_importance(data, forward=stacked)
    assert [w.filename for w in (*warned, *warned_by_mas)] == [__file__] * 2


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_stays_what_it_is():
    with pytest.raises(UserWarning, match="one sample at a time"):
        estimate_importance(mlp(), [list(vectors())], forward=stacked)


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "in the forward"])
@pytest.mark.parametrize(("make", "data"), [(mlp, vectors), (convnet, images)])
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


# ================================================================================================
# Hooks
# ================================================================================================
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
def test_hooks_of_the_user_run_and_stay(name):
    model, x, seen = mlp(), vectors(), []
    HOOKS[name](model[2], seen)
    expected = one_by_one(model, [x])
    before = copy.copy(vars(model[2]))
    seen.clear()
    assert_exact(estimate_importance(model, x.split(4)), expected)
    assert seen
    assert vars(model[2]).keys() == before.keys()
    assert all(len(value) == len(before[k]) for k, value in vars(model[2]).items() if "hooks" in k)


def test_nothing_is_accumulated_into_gradients():
    """A hook after accumulation is how an optimizer steps within backward: it must not run."""
    model, seen = mlp(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(counting(seen))
    estimate_importance(model, [vectors()])
    assert not seen
    assert all(p.grad is None for p in model.parameters())


# ================================================================================================
# A training run must not notice
# ================================================================================================
def trainee() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(144, 3), nn.BatchNorm1d(3))


def train(measure_at: str | None, context: Callable[[], AbstractContextManager]) -> list[Any]:
    """Three steps with two gradients each; what is left at the end of every step."""
    model = trainee()
    mas = MAS(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)
    history = []

    def pause(where: str) -> None:
        if where == measure_at:
            mas.update_importance(loader)

    for _ in range(3):
        with context():
            pause("before the forward")
            loss = model(images).square().mean()
            pause("between forward and backward")
            loss.backward()
            pause("between two backwards")
            model(images).abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            pause("after the step")
        history.append(
            [
                copy.deepcopy(model.state_dict()),
                copy.deepcopy(optimizer.state_dict()),
                [p.grad.clone() for p in model.parameters()],
                [module.training for module in model.modules()],
                torch.get_rng_state(),
                float(loss.detach()),
            ]
        )
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
    assert_same_state(train(moment, context), train(None, context))


# ================================================================================================
# Interruption
# ================================================================================================
def measure_and_snapshot(mas: MAS, batches: list[Tensor], where: str) -> list[Any]:
    """The states that a program could have saved after each batch but the last."""
    states: list[Any] = []

    def data():
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
    whole = MAS(model)
    if earlier:
        whole.update_importance([x[:3]])
    states = measure_and_snapshot(whole, batches, where)
    assert len(states) == len(batches) - 1
    for done, state in enumerate(states, 1):
        resumed = MAS(model)
        resumed.load_state_dict(state)
        resumed.update_importance(batches[done:])
        assert_same_state(resumed.state_dict(), whole.state_dict())
