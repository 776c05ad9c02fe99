"""state_device="cpu": Ω and θ* in host memory, and brought to the parameters in pieces.

Where there is no accelerator, everything is on the CPU, and pieces are forced: what was one call
must be the same in many. That no more than two pieces are on the device is counted with fake
tensors, and the order of copies and kernels with streams that only take notes.
"""

import copy
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mas_ext
from mas_ext import EWC, L2SP, MAS, DriftBudget
from mas_ext._penalty import streaming
from mas_ext._penalty.streaming import Part, plan
from mas_ext.precision import BLOCK
from tests.support.hand_loop import HandLoop, Protection, assert_trained
from tests.support.regularizers import (
    assert_bits,
    assert_refused,
    assert_states_equal,
    gradients,
    move,
    penalty_by_hand,
    refusal,
)

PIECE = 2 * BLOCK
LAMBDAS = {"2.*": 3.0, "*": 2.0}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
STATE_DTYPES = ["float32", "bfloat16", "uint8"]
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])
each_state_dtype = pytest.mark.parametrize("state_dtype", STATE_DTYPES)


@pytest.fixture
def pieces(monkeypatch):
    """Everything that is in pieces from now on; the groups and pieces are noted."""
    sizes = []
    pieces_of = streaming.pieces_of

    def noted(group, *lists, whole=False):
        for piece, parts in pieces_of(group, *lists, whole=whole):
            sizes.append([omega.numel() for omega in piece.omega])
            yield piece, parts

    monkeypatch.setattr(streaming, "PIECE", PIECE)
    monkeypatch.setattr(streaming, "is_elsewhere", lambda state, device: True)
    monkeypatch.setattr(streaming, "pieces_of", noted)
    return sizes


def network(dtype=torch.float32):
    """Tensors of less than a block, of several pieces, with other strides, and with gaps."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 9, 5).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(36, 70), nn.Tanh(), nn.Linear(70, 4))
    model[4].weight = nn.Parameter(torch.randn(4, 140)[:, ::2] / 8)
    return model.to(dtype)


def images(dtype=torch.float32, count=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 5, 6, 6, generator=generator).to(dtype)


def learned(dtype=torch.float32, method=MAS, lambda_reg=LAMBDAS, **options):
    model = network(dtype)
    mas = method(model, lambda_reg, state_device="cpu", **options)
    mas.consolidate([images(dtype)])
    move(model)
    return model, mas


def loss(model):
    return (model(images(next(model.parameters()).dtype)) - 1).square().mean()


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


# ================================================================================================
# What is in which piece
# ================================================================================================
def test_every_element_is_in_one_piece_and_cuts_are_at_blocks():
    generator = torch.Generator().manual_seed(0)
    for seed, length in enumerate([1, 2, 5, 30] * 20):
        sizes = torch.randint(0, 2000, (length,), generator=generator).tolist()
        may_be_cut = torch.randint(0, 2, (length,), generator=generator).bool().tolist()
        size = BLOCK * (1 + seed % 5)
        seen = {i: [] for i in range(length)}
        found = plan(sizes, may_be_cut, size)
        for piece in found:
            elements = 0
            for part in piece:
                whole = part.elements is None
                begin, end = (0, sizes[part.place]) if whole else _ends(part)
                assert whole or may_be_cut[part.place]
                assert begin % BLOCK == 0
                seen[part.place] += range(begin, end)
                elements += end - begin
            assert elements <= size or all(
                part.elements is None and not may_be_cut[part.place]
                for part in piece
                if sizes[part.place]
            )
            big = [part for part in piece if sizes[part.place] > size and part.elements is None]
            assert not big or elements == sizes[big[0].place]
        assert {i: list(range(n)) for i, n in enumerate(sizes)} == seen
        if all(may_be_cut):
            assert len(found) <= sum(sizes) // (size - BLOCK + 1) + 1


def _ends(part: Part):
    return part.elements.start, part.elements.stop


# ================================================================================================
# The penalty in pieces
# ================================================================================================
def in_pieces_and_not(monkeypatch, run):
    """What ``run`` returns as it is, and once more in pieces."""
    expected = run()
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "PIECE", PIECE)
        patch.setattr(streaming, "is_elsewhere", lambda state, device: True)
        return expected, run()


@each_mode
@each_state_dtype
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_in_pieces_has_the_same_bits(dtype, state_dtype, mode, monkeypatch):
    def run():
        model, mas = learned(dtype, state_dtype=state_dtype)
        value = mas.add_penalty_grad_(0.5) if mode == "gradient" else mas.proximal_step_(0.1)
        return model, gradients(model), value

    (plain, grads, value), (model, ours, sum_of_pieces) = in_pieces_and_not(monkeypatch, run)
    assert_bits(model, plain)
    assert_states_equal(ours, grads)
    assert sum_of_pieces.dtype == value.dtype
    torch.testing.assert_close(
        sum_of_pieces, value, rtol=1e-12 if dtype.itemsize > 4 else 3e-7, atol=0
    )


@each_mode
def test_training_in_pieces_is_that_by_hand(mode, pieces):
    model, mas = learned(torch.float64, lambda_reg=3.0)
    start = copy.deepcopy(model)
    hand = HandLoop(
        model,
        Protection.of(mas),
        lambda named: torch.optim.SGD(named.values(), 0.05, foreach=False),
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    handle = mas.attach(optimizer, mode, every=1)
    for _ in range(3):
        train(model, optimizer, 1)
        hand.step([loss], proximal=mode == "proximal")
        assert float(handle.last_penalty) == pytest.approx(hand.penalties[-1], rel=1e-12)
    assert_trained(model, hand.theta, start, 1e-12)
    assert max(map(sum, pieces)) == PIECE
    assert sum(map(sum, pieces)) == 3 * sum(p.numel() for p in model.parameters())


def test_what_has_not_one_layout_stays_whole(pieces):
    """Gradients with other strides than θ*, and parameters with gaps, of which θ* has none."""
    model, mas = learned()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].weight.grad = torch.zeros(model[0].weight.shape)
    model[2].weight.grad = torch.zeros(36, 70).t()
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    right = Protection.of(mas, 1.0)
    mas.lambda_reg = 1.0
    mas.add_penalty_grad_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad.double(), right.gradient(name, expected[name]), rtol=1e-6, atol=1e-9
        )
    assert [model[0].weight.numel()] in pieces
    assert [model[2].weight.numel()] in pieces


OURS = {
    "SGD": {"lr": 0.05},
    "momentum": {"lr": 0.05, "momentum": 0.9, "dampening": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01},
}


@each_mode
@each_state_dtype
@pytest.mark.parametrize("kind", OURS)
def test_our_optimizers_in_pieces_have_the_same_bits(kind, state_dtype, mode, monkeypatch):
    def run():
        model, mas = learned(state_dtype=state_dtype)
        ours = getattr(mas_ext.optim, "SGD" if kind == "momentum" else kind)
        optimizer = ours(model.parameters(), mas=mas, mode=mode, **OURS[kind])
        train(model, optimizer)
        return model, optimizer.state_dict(), optimizer.last_penalty

    (plain, state, value), (model, ours, sum_of_pieces) = in_pieces_and_not(monkeypatch, run)
    assert_bits(model, plain)
    assert_states_equal(ours, state)
    torch.testing.assert_close(sum_of_pieces, value, rtol=3e-7, atol=0)


@each_state_dtype
def test_the_penalty_is_twice_differentiable(state_dtype, pieces):
    model, mas = learned(torch.float64, state_dtype=state_dtype)
    params = list(model.parameters())
    strength = {n: 3.0 if n.startswith("2.") else 2.0 for n in mas.anchor}
    values = [mas.penalty(), penalty_by_hand(mas, model, strength.__getitem__)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    first = [torch.autograd.grad(-1.7 * v.square(), params, create_graph=True) for v in values]
    second = [torch.autograd.grad(sum(g.sin().sum() for g in each), params) for each in first]
    for ours, exact in ((*first,), (*second,)):
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(pieces) > 2
    pieces.clear()
    once = torch.autograd.grad(-1.7 * mas.penalty().square(), params)
    assert_states_equal(once, first[0])
    assert max(map(sum, pieces)) <= PIECE
    assert sum(map(sum, pieces)) == 2 * sum(p.numel() for p in params)
    with torch.no_grad():
        assert not mas.penalty().requires_grad


@pytest.mark.parametrize("what", ["θ", "θ*"])
def test_autograd_notices_what_was_written_before_the_backward_pass(what, pieces):
    model, mas = learned()
    value = mas.penalty()
    with torch.no_grad():
        (model[2].weight if what == "θ" else mas.anchor["2.weight"]).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ================================================================================================
# Everything else that a MAS does
# ================================================================================================
@each_mode
@each_state_dtype
@pytest.mark.parametrize("merge", ["sum", "sum_of_sums"])
def test_tasks_in_pieces_have_the_same_bits(merge, state_dtype, mode, monkeypatch):
    def run():
        model, mas = learned(merge=merge, state_dtype=state_dtype)
        for task in range(2):
            optimizer = torch.optim.SGD(model.parameters(), 0.05)
            handle = mas.attach(optimizer, mode)
            train(model, optimizer, 9)
            handle.remove()
            mas.consolidate([images() + task])
        return model, mas.state_dict()

    (plain, state), (model, ours) = in_pieces_and_not(monkeypatch, run)
    assert_bits(model, plain)
    assert_states_equal(ours, state)


def live(method):
    """Two tasks with everything that a drift budget does."""
    torch.manual_seed(3)
    model = network(torch.float64)
    mas = method(model, budget=DriftBudget(0.01, "relative"), state_device="cpu")
    seen = []
    for task in range(2):
        mas.consolidate([images(torch.float64) + task])
        optimizer = torch.optim.SGD(model.parameters(), 0.02)
        handle = mas.attach(optimizer) if task else mas.attach(optimizer, "proximal", every=2)
        train(model, optimizer, 5)
        seen += [handle.last_penalty, mas.lambda_reg, mas.penalty().detach()]
        handle.remove()
        move(model, 0.3)
        seen.append(mas.settle(weights="uniform" if task else "importance"))
    mas.consolidate([images(torch.float64)])
    return model, mas, seen


@pytest.mark.parametrize("method", [MAS, EWC, L2SP], ids=lambda method: method.__name__)
def test_a_budget_in_pieces_is_kept_in_the_same_way(method, monkeypatch):
    """λ follows the penalty, whose last bit depends on how many sums it is the sum of."""
    ways = in_pieces_and_not(monkeypatch, lambda: live(method))
    (plain, before, expected), (model, mas, seen) = ways
    assert seen[3].c > 0
    assert seen[-1].c > 0
    for a, b in zip(expected, seen, strict=True):
        for x, y in zip(_numbers(a), _numbers(b), strict=True):
            assert x == pytest.approx(y, rel=1e-9)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(mas.importance[name], before.importance[name], rtol=1e-7, atol=0)
        torch.testing.assert_close(mas.anchor[name], before.anchor[name], rtol=1e-9, atol=1e-12)


def _numbers(value):
    if isinstance(value, dict):
        return list(value.values())
    return [value.before, value.after, value.c] if hasattr(value, "c") else [float(value)]


@pytest.mark.parametrize("kind", ["attached", "ours"])
def test_a_scaler_skips_a_step_for_an_inf_in_a_later_piece(kind, pieces):
    """Which is found before the first piece is written."""
    model, mas = learned()
    mas.importance["2.weight"].view(-1)[-1] = torch.inf
    before, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    if kind == "ours":
        optimizer = mas_ext.optim.SGD(model.parameters(), 0.05, mas=mas)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        mas.attach(optimizer)
    scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_bits(model, before)
    assert scaler.get_scale() == 32.0
    assert [PIECE] in pieces


@pytest.mark.parametrize("way", ["add_penalty_grad_", "proximal_step_", "penalty"])
def test_compiled_code_calls_pieces_as_they_are(way, pieces):
    model, mas = learned()
    call = {"proximal_step_": lambda: mas.proximal_step_(0.1)}.get(way, getattr(mas, way))
    plain, other = copy.deepcopy((model, mas))
    expected = {"proximal_step_": lambda: other.proximal_step_(0.1)}.get(way, getattr(other, way))()
    value = torch.compile(call, backend="eager")()
    assert torch.equal(value, expected)
    assert_bits(model, plain)
    assert_states_equal(gradients(model), gradients(plain))


# ================================================================================================
# Where the state is, and stays
# ================================================================================================
@pytest.mark.parametrize("method", [MAS, EWC, L2SP], ids=lambda method: method.__name__)
def test_it_stays_where_it_is(method, tmp_path):
    model, mas = learned(method=method)
    assert mas.state_device == "cpu"
    assert method(network()).state_device is None
    mas.save(tmp_path / "state")
    for load in (
        lambda other: other.load(tmp_path / "state"),
        lambda other: other.load_state_dict(mas.state_dict()),
    ):
        for device in (None, "cpu"):
            other = method(copy.deepcopy(model), state_device=device)
            load(other)
            assert other.state_device == device
            assert_states_equal(other.state_dict(), mas.state_dict())
    for other in (copy.deepcopy(mas), pickle.loads(pickle.dumps(mas))):
        assert other.state_device == "cpu"
        assert_states_equal(other.state_dict(), mas.state_dict())
        assert torch.equal(other.proximal_step_(0.1), copy.deepcopy(mas).proximal_step_(0.1))


@pytest.mark.parametrize("device", ["cuda", "gpu", "meta", torch.device("cpu"), True, 0], ids=str)
@pytest.mark.parametrize("method", [MAS, EWC, L2SP], ids=lambda method: method.__name__)
def test_other_devices_are_refused(method, device):
    case = refusal(
        lambda: method(network(), state_device=device), ValueError, "state_device", "'cpu'", "None"
    )
    assert_refused(case)


def test_adapters_that_are_merged_are_refused():
    case = refusal(
        lambda: MAS(network(), adapters="merged", state_device="cpu"),
        ValueError,
        "state_device",
        'adapters="separate"',
    )
    assert_refused(case)


def shared_gradient(model, mas):
    model[4].bias.grad = model[0].weight.grad.as_strided((4,), (1,))


def expanded_gradient(model, mas):
    model[4].bias.grad = torch.zeros(1).expand(4)


def narrow_gradient(model, mas):
    model[4].bias.grad = None
    model[4].bias.grad_dtype = torch.float16
    model[4].bias.grad = torch.zeros(4, dtype=torch.float16)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (shared_gradient, "clone()"),
        (expanded_gradient, "clone()"),
        pytest.param(
            *(narrow_gradient, "convert"),
            marks=pytest.mark.skipif(
                not hasattr(torch.Tensor, "grad_dtype"),
                reason="in older versions of torch a gradient has the parameter's dtype",
            ),
        ),
    ],
)
def test_what_is_refused_in_the_last_piece_leaves_the_first_as_it_was(spoil, word, pieces):
    model, mas = learned()
    loss(model).backward()
    spoil(model, mas)
    before = gradients(model)
    assert_refused(
        refusal(mas.add_penalty_grad_, RuntimeError, "4.bias", word), unchanged=(model, mas)
    )
    assert_states_equal(gradients(model), before)
    if spoil is narrow_gradient:
        ours = mas_ext.optim.SGD(model.parameters(), 0.05, mas=mas)
        assert_refused(
            refusal(ours.step, RuntimeError, "4.bias", word), unchanged=(model, mas, ours)
        )


# ================================================================================================
# Memory on the device, with fake tensors
# ================================================================================================
class Alive(TorchDispatchMode):
    """The most bytes on a fake device that calls allocate, at one time."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        for storage in map(_storage, tree_leaves(out)):
            if storage is not None and id(storage) not in given:
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = [reference() for reference in self.storages.values()]
        self.most = max(self.most, sum(s.nbytes() for s in alive if s is not None))
        return out


def _storage(tensor):
    is_there = isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda"
    return tensor.untyped_storage() if is_there else None


CALLS = {
    "add_penalty_grad_": lambda mas: mas.add_penalty_grad_(),
    "proximal_step_": lambda mas: mas.proximal_step_(0.1),
    "penalty": lambda mas: mas.protected.penalty(),
}


TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins what is fake; see tests/hardware/gpu")
@pytest.mark.skipif(TORCH < (2, 13), reason="older versions of torch want a driver for fake CUDA")
@pytest.mark.parametrize("call", CALLS)
@each_state_dtype
def test_two_pieces_are_all_that_is_ever_on_the_device(state_dtype, call, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE", 64 * BLOCK)
    small = 2048  # bytes: values of the penalty, and rounding to cache lines
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = [nn.Linear(400, 300, device="cuda"), nn.Linear(300, 30, device="cuda")]
        model = nn.Sequential(*layers)
        mas = MAS(model, 2.0, state_dtype=state_dtype, state_device="cpu")
        mas.protected.state.consolidated.make_room(dict(model.named_parameters()))
        for tensor in (*mas.anchor.values(), *mas.importance.values()):
            assert tensor.device.type == "cpu"
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = mas.anchor["0.weight"]
        with torch.no_grad(), Alive() as alive:
            value = CALLS[call](mas)
        assert mas.anchor["0.weight"] is before, "it follows parameters that have not changed"
    assert value.device.type == "cuda"
    per_parameter = 4 + {"float32": 4, "bfloat16": 2, "uint8": 1 + 4 / BLOCK}[state_dtype]
    expected = 2 * 64 * BLOCK * per_parameter
    assert expected <= alive.most <= expected + small
    assert expected < per_parameter * sum(p.numel() for p in model.parameters()) / 3


# ================================================================================================
# Copies and kernels in order
# ================================================================================================
class LateCopies(streaming._Copies):
    """A copy that happens as late as it may; plain ones happen as early as they may."""

    def begin(self, buffer, lists):
        return buffer, lists

    def end(self, copied):
        return super().begin(*copied)


def test_a_copy_may_be_late(pieces, monkeypatch):
    (plain, before), (model, mas) = learned(), learned()
    before.proximal_step_(0.1)
    monkeypatch.setattr(streaming, "_copies_on", lambda device: LateCopies())
    mas.proximal_step_(0.1)
    assert_bits(model, plain)


class Notes(list):
    """What streams would have been given, in the order in which it was."""


class NotedStream:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append((self.name, "waits for", other.name))

    def record_event(self):
        return len(self.notes)

    def wait_event(self, event):
        self.notes.append((self.name, "waits for note", event))

    def __enter__(self):
        self.notes.append((self.name, "begins a copy", None))

    def __exit__(self, *error):
        self.notes.append((self.name, "ends a copy", None))


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_cuda_device_copies_and_kernels_wait_for_each_other(pieces, fails, monkeypatch):
    """Piece i + 1 is copied behind the kernels of i − 1, which used its buffer, and beside i's."""
    notes = Notes()
    side, current = NotedStream("side", notes), NotedStream("current", notes)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(streaming, "_copy_stream", lambda device: side)
    monkeypatch.setattr(streaming, "_copies_on", streaming._CudaCopies)
    _, mas = learned(lambda_reg=2.0)
    (group,) = mas.protected.groups()

    def kernel(piece, lists):
        notes.append(("current", "computes", None))
        if fails:
            raise RuntimeError("out of memory")
        return torch.zeros(())

    try:
        streaming.sum_over_pieces(group, kernel)
    except RuntimeError as error:
        assert fails
        del error
    copy_of_one = [("side", "waits for", "current"), ("side", "begins a copy", None)]
    copy_of_one.append(("side", "ends a copy", None))
    expected, ends = [*copy_of_one], [3]
    for i in itertools.count():
        if i + 1 < len(pieces) or fails:
            expected += copy_of_one
            ends.append(len(expected))
        expected.append(("current", "waits for note", ends[i]))
        expected.append(("current", "computes", None))
        if fails or i + 1 == len(pieces):
            break
    expected.append(("current", "waits for", "side"))
    assert notes == expected
    assert fails or len(pieces) > 4


def test_streams_are_for_cuda_alone(monkeypatch):
    assert type(streaming._copies_on(torch.device("cpu"))) is streaming._Copies
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(streaming._copies_on(torch.device("cuda"))) is streaming._Copies
