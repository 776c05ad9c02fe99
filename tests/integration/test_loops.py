"""Training loops as people write them, each a row of one table, against the loop by hand.

A new variant is a new :class:`Loop`. λ changes at every step of every loop.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import mas_ext
from mas_ext import MAS
from tests.support.hand_loop import HandLoop, Protection, assert_trained
from tests.support.regularizers import assert_bits, assert_states_equal, learned, move
from tests.support.zoo.small import assert_same, mlp, vectors

X = vectors(12)
STRENGTHS = [5.0, 2.0, 9.0, 0.0, 7.0, 3.0]
CLIP, SCALE = 0.2, 1024.0

# Optimizer → its class, options and those of them that mas_ext.optim has.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.05}),
    "decay": ("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    "momentum": ("SGD", {"lr": 0.05, "momentum": 0.9}),
    "dampening": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "Adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6}),
    "default AdamW": ("AdamW", {"lr": 0.01}),
    "tensor lr": ("AdamW", {"lr": torch.tensor(0.01)}),
    "RMSprop": ("RMSprop", {"lr": 0.01}),
    "Adagrad": ("Adagrad", {"lr": 0.01}),
}
OURS = [kind for kind, (name, _) in KINDS.items() if hasattr(mas_ext.optim, name)]
MODES = ["gradient", "proximal"]


@dataclass(frozen=True)
class Loop:
    """One way to train.

    Attributes:
        kind: the optimizer, a key of ``KINDS``.
        way: ``"attached"``; ``"ours"``, an optimizer of ``mas_ext.optim``; ``"called"``,
            ``add_penalty_grad_`` or ``proximal_step_`` in the loop; or ``"in the loss"``.
        mode: of the penalty.
        implementation: ``"plain"``, ``"foreach"`` or ``"fused"``, of torch's optimizers.
        dtype: of the model.
        micro: micro-batches per step.
        clip: what is clipped: ``"loss"``, the loss's gradient; ``"both"``, with the penalty's; or
            None.
        scale: the loss scaler's first; None without one, 0 for one that is switched off.
        inf: what is infinite in the step ``inf_at``, which the scaler then skips; a key of
            ``INFINITE``, or ``"loss"``.
        inf_at: the number of that step.
        autocast: the dtype of the forward pass.
        closure: the optimizer gets a closure, ``"positional"`` or ``"keyword"``.
        groups: two parameter groups with options of their own, one of them added later, and a
            schedule.
        tasks: the first steps come before the first task.
        params: which parameters are protected.
        around: ``"ZeRO"``, or ``"backward"``: an optimizer for each parameter, which steps in the
            backward pass.
        maximize: the optimizer ascends, on the negative loss.
        compiled: what is compiled, a key of ``COMPILED``.
    """

    kind: str = "momentum"
    way: str = "attached"
    mode: str = "gradient"
    implementation: str = "plain"
    dtype: torch.dtype = torch.float64
    micro: int = 1
    clip: str | None = None
    scale: float | None = None
    inf: str | None = None
    inf_at: int = 2
    autocast: torch.dtype | None = None
    closure: str | None = None
    groups: bool = False
    tasks: bool = False
    params: tuple[str, ...] | None = None
    around: str | None = None
    maximize: bool = False
    compiled: str | None = None

    def __str__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        names = ("kind", "way", "mode")
        others = [
            f"{f.name}={shown[f.name]}" for f in fields(self)[3:] if shown[f.name] != f.default
        ]
        return " ".join([*(shown[name] for name in names), *others]).replace("torch.", "")

    @property
    def tolerance(self) -> float:
        """As part of the way that the parameters move."""
        if self.autocast:
            return 0.02  # a rounding in the forward pass moves a gradient by 2⁻⁸ of itself
        if self.dtype == torch.float32:
            return 2e-4
        is_fused_adam = "Adam" in KINDS[self.kind][0] and self.implementation != "plain"
        has_float32_steps = is_fused_adam or self.way == "ours" or self.kind == "tensor lr"
        return 1e-6 if has_float32_steps else 1e-10


# -- The model, the optimizer and what goes wrong --------------------------------------------------
def loss_of(model: nn.Module, x: Tensor, narrow: torch.dtype | None) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    with torch.autocast("cpu", narrow) if narrow else nullcontext():
        output = model(x)
    assert narrow is None or output.dtype == narrow
    return (output.double() - 1).pow(2).mean().to(x.dtype)


def losses_of(loop: Loop) -> list[Callable[[nn.Module], Tensor]]:
    return [partial(loss_of, x=x, narrow=loop.autocast) for x in X.chunk(loop.micro)]


def grouped(named: dict[str, Tensor]) -> list[dict[str, Any]]:
    """All but one parameter, in two groups."""
    return [
        {"params": [p for n, p in named.items() if n.startswith("0.")], "lr": 0.03},
        {"params": [named["2.weight"]], "weight_decay": 0.3},
    ]


def optimizer_by_hand(loop: Loop, named: dict[str, Tensor]) -> torch.optim.Optimizer:
    name, options = KINDS[loop.kind]
    groups = grouped(named) if loop.groups else list(named.values())
    return getattr(torch.optim, name)(groups, foreach=False, **copy.deepcopy(options))


def optimizer_of(
    loop: Loop, params: Any, mas: MAS
) -> tuple[torch.optim.Optimizer, Callable[[], Tensor | None]]:
    """The optimizer, with the penalty in its step unless the loop brings it, and what tells it."""
    name, options = KINDS[loop.kind]
    options = copy.deepcopy(options) | ({"maximize": True} if loop.maximize else {})
    make = getattr(torch.optim, name)
    if loop.way == "ours":
        make = getattr(mas_ext.optim, name)
        options |= {"mas": mas, "mode": loop.mode}
    elif loop.implementation != "plain":
        options[loop.implementation] = True
    elif "foreach" in inspect.signature(make).parameters and loop.around != "ZeRO":
        options["foreach"] = False
    if loop.around == "ZeRO":
        optimizer = ZeroRedundancyOptimizer(params, make, **options)
    else:
        optimizer = make(params, **options)
    if loop.way == "attached":
        handle = mas.attach(optimizer, loop.mode, every=1)
        return optimizer, lambda: handle.last_penalty
    inner = optimizer.optim if loop.around == "ZeRO" else optimizer
    return optimizer, lambda: getattr(inner, "last_penalty", None)


def infinite_product(mas: MAS) -> None:
    mas.lambda_reg = 3e38
    mas.importance["0.weight"].mul_(1e4)  # the penalty's factors are finite, λΩδ is not


def infinite_importance(mas: MAS) -> None:
    mas.importance["0.weight"][1, 2] = torch.inf


def infinite_anchor(mas: MAS) -> None:
    mas.anchor["0.bias"][3] = -torch.inf


INFINITE = {
    "product": infinite_product,
    "importance": infinite_importance,
    "anchor": infinite_anchor,
}


@contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# -- The step of a loop ----------------------------------------------------------------------------
class Trained:
    """A model that one of the loops trains, and the loop by hand beside it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        start = mlp(loop.dtype)
        if loop.tasks:
            self.model, self.mas = start, MAS(start, params=loop.params)
        else:
            self.model, self.mas = learned(5.0, loop.dtype, params=loop.params)
        self.start = copy.deepcopy(self.model)
        narrow = loop.autocast is not None
        reference = self.model if narrow else copy.deepcopy(self.model).double()
        make = partial(optimizer_by_hand, loop)
        self.hand = HandLoop(reference, Protection.of(self.mas), make)
        self.optimizer: Any = None
        self.penalty: Callable[[], Tensor | None] = lambda: None
        if loop.around == "backward":
            self._step_in_backward()
        else:
            named = dict(self.model.named_parameters())
            params = grouped(named) if loop.groups else list(named.values())
            self.optimizer, self.penalty = optimizer_of(loop, params, self.mas)
        self.scaler = None
        if loop.scale is not None:
            self.scaler = torch.amp.GradScaler(
                "cpu", init_scale=loop.scale or 1.0, growth_interval=1000, enabled=loop.scale > 0
            )
        self.take = COMPILED[loop.compiled](self) if loop.compiled else self.step

    def _step_in_backward(self) -> None:
        def make(p: nn.Parameter) -> Callable[[Tensor], None]:
            optimizer, _ = optimizer_of(self.loop, [p], self.mas)

            def step(p: Tensor) -> None:
                optimizer.step()
                optimizer.zero_grad()

            return step

        for p in self.model.parameters():
            p.register_post_accumulate_grad_hook(make(p))

    def states(self) -> list[Any]:
        """Copies of the model's and the optimizer's."""
        optimizer = getattr(self.optimizer, "optim", self.optimizer)  # what ZeRO shards
        return copy.deepcopy([self.model.state_dict(), optimizer.state_dict()["state"]])

    def loss(self, part: Callable[[nn.Module], Tensor], factor: float = 1.0) -> Tensor:
        total = part(self.model) * factor
        if self.loop.way == "in the loss":
            with self.autocast():
                total = total + self.mas.penalty()
        return -total if self.loop.maximize else total

    def autocast(self) -> Any:
        """Also around what is not the forward pass, where it must change nothing."""
        return torch.autocast("cpu", self.loop.autocast) if self.loop.autocast else nullcontext()

    def backward(self, factor: float = 1.0) -> None:
        parts = losses_of(self.loop)
        for i, part in enumerate(parts):
            loss = self.loss(part, factor if i == len(parts) - 1 else 1.0) / len(parts)
            (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, factor: float = 1.0) -> None:
        loop = self.loop
        if loop.around == "backward":
            self.backward()
            return
        self.optimizer.zero_grad()
        if loop.closure:

            def closure() -> Tensor:
                self.optimizer.zero_grad()
                self.backward()
                return losses_of(loop)[0](self.model)

            given = {"closure": closure} if loop.closure == "keyword" else {}
            assert self.optimizer.step(*([] if given else [closure]), **given) > 0
            return
        self.backward(factor)
        with self.autocast():
            if self.scaler and loop.clip:
                self.scaler.unscale_(self.optimizer)
            if loop.clip == "loss":
                nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            if loop.way == "called" and loop.mode == "gradient":
                scaler = self.scaler
                self.mas.add_penalty_grad_(grad_scale=scaler.get_scale() if scaler else None)
            if loop.clip == "both":
                nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            if self.scaler:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            else:
                self.optimizer.step()
            if loop.way == "called" and loop.mode == "proximal":
                self.mas.proximal_step_(KINDS[loop.kind][1]["lr"])


def run(loop: Loop) -> None:
    """Both loops, step by step."""
    at = loop.inf_at if loop.inf else None
    t = Trained(loop)
    schedules = []
    for number, strength in enumerate(STRENGTHS):
        if loop.tasks and number == 2:
            t.mas.consolidate([X.to(loop.dtype)])
            t.hand.protection = Protection.of(t.mas)
        if loop.groups and number == 1:
            for optimizer, named in (
                (t.optimizer, dict(t.model.named_parameters())),
                (t.hand.optimizer, t.hand.theta),
            ):
                optimizer.add_param_group({"params": [named["2.bias"]], "lr": 0.01})
                schedules.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        t.mas.lambda_reg = strength
        t.hand.protection = t.hand.protection._replace(strength=strength)
        is_skipped = number == at
        before = t.states() if is_skipped else None
        clean = t.mas.state_dict()
        if is_skipped and loop.inf in INFINITE:
            INFINITE[loop.inf](t.mas)
        # A second step may compile: it finds a momentum, and gradients, where there were none.
        is_settled = loop.compiled and number > 1
        with torch.compiler.set_stance("fail_on_recompile") if is_settled else nullcontext():
            t.take(*([torch.inf] if is_skipped and loop.inf == "loss" else []))
        if is_skipped:
            assert_skipped(t, before)
            t.mas.load_state_dict(clean)
        t.hand.step(
            losses_of(loop),
            clip=CLIP if loop.clip else None,
            clip_penalty=loop.clip == "both",
            proximal=loop.mode == "proximal",
            skip=is_skipped,
        )
        value = t.penalty()
        if value is not None and not is_skipped and not loop.closure:
            assert value.item() == pytest.approx(t.hand.penalties[-1], rel=10 * loop.tolerance)
        for schedule in schedules:
            schedule.step()
    if t.scaler and loop.scale:
        assert t.scaler.get_scale() == loop.scale / (2 if loop.inf else 1)
    assert_trained(t.model, t.hand.theta, t.start, loop.tolerance)


def assert_skipped(t: Trained, before: list[Any]) -> None:
    """Neither the parameters nor the optimizer's state moved, its counts of steps included."""
    assert_states_equal(t.states()[0], before[0])
    (_, found), (_, had) = t.states(), before
    for index, values in found.items():
        zeros = {name: torch.zeros_like(value) for name, value in values.items()}
        assert_same(values, had.get(index) or zeros, 0, 0)
    if t.loop.inf != "loss" and t.loop.clip is None:
        assert not all(p.grad.isfinite().all() for p in t.model.parameters()) or (
            t.loop.way == "ours"
        ), "gradients that were withheld are given back"


# -- Compiled steps --------------------------------------------------------------------------------
# Dynamo does the same for every backend, and inductor takes long.
compile_ = partial(torch.compile, backend="aot_eager")


def compiled_loss(t: Trained) -> Callable[[], None]:
    (part,) = losses_of(t.loop)
    loss = compile_(lambda: t.loss(part), fullgraph=True)
    return lambda: (t.optimizer.zero_grad(), loss().backward(), t.optimizer.step())


def compiled_addition(t: Trained) -> Callable[[], None]:
    add = compile_(lambda: t.mas.add_penalty_grad_(), fullgraph=True)
    return lambda: (t.optimizer.zero_grad(), t.backward(), add(), t.optimizer.step())


def compiled_proximal_step(t: Trained) -> Callable[[], None]:
    pull = compile_(t.mas.proximal_step_, fullgraph=True)
    return lambda: (t.optimizer.zero_grad(), t.backward(), t.optimizer.step(), pull(0.05))


def compiled_optimizer(t: Trained) -> Callable[[], None]:
    """torch breaks a step with hooks in two; one of ours is compiled whole."""
    take = compile_(t.optimizer.step, fullgraph=t.loop.way == "ours")
    return lambda: (t.optimizer.zero_grad(), t.backward(), take())


def compiled_whole(t: Trained) -> Callable[[], None]:
    return compile_(t.step)


def compiled_model(t: Trained) -> Callable[[], None]:
    t.model.compile(backend="aot_eager")
    return t.step


COMPILED = {
    "loss": compiled_loss,
    "addition": compiled_addition,
    "proximal step": compiled_proximal_step,
    "optimizer": compiled_optimizer,
    "all": compiled_whole,
    "model": compiled_model,
}


# -- The table -------------------------------------------------------------------------------------
def loops(*shared: dict[str, Any], **columns: Any) -> list[Loop]:
    """One for every combination of what is listed; ``shared``: columns that change together."""
    lists = [value if isinstance(value, list) else [value] for value in columns.values()]
    combined = [dict(zip(columns, values, strict=True)) for values in itertools.product(*lists)]
    return [Loop(**{**row, **more}) for more in shared or ({},) for row in combined]


IN_STEP = (
    {"way": "attached"},
    {"way": "attached", "implementation": "fused"},
    {"way": "ours"},
)
BOTH = ["attached", "ours"]
FINITE_OR_NOT = [None, "loss", *INFINITE]
SCALED = {"dtype": torch.float32, "scale": SCALE}
NARROW = [torch.bfloat16, torch.float16]
LOOPS = [
    # every optimizer, in every way
    *loops(kind=[kind for kind in KINDS if kind != "tensor lr"], mode=MODES),
    *loops(kind=OURS, way="ours", mode=MODES),
    *loops(kind=["momentum", "Adam", "AdamW"], implementation=["foreach", "fused"], mode=MODES),
    Loop(way="in the loss"),
    *loops(kind=["momentum", "AdamW"], way="called", mode=MODES),
    *loops(kind="AdamW", way="ours", mode=MODES, maximize=True),
    # two tasks; parameters that are not protected
    *loops(kind=OURS, way="ours", mode=MODES, tasks=True),
    *loops(way=BOTH, tasks=True, params=("0.*",)),
    *loops(kind=OURS, way="ours", mode=MODES, params=("0.*",)),
    # parameter groups and schedules
    *loops(kind=["dampening", "AdamW"], way=BOTH, mode=MODES, groups=True),
    # clipping, accumulation, closures
    *loops(way=[*BOTH, "called"], clip="loss"),
    *loops(way=["called", "in the loss"], clip="both"),
    *loops(way=[*BOTH, "called", "in the loss"], micro=3),
    *loops(closure=["positional", "keyword"]),
    Loop(way="ours", closure="positional"),
    # an optimizer for each parameter, a sharded one
    *loops(way=BOTH, mode=MODES, around=["backward", "ZeRO"]),
    Loop("AdamW", around="ZeRO", mode="proximal"),
    # loss scaling
    *loops(*IN_STEP, kind=["momentum", "AdamW"], clip=[None, "loss"], inf=FINITE_OR_NOT, **SCALED),
    *loops(
        *IN_STEP,
        kind=["nesterov", "AdamW"],
        mode="proximal",
        inf=[None, "loss"],
        params=("0.*",),
        **SCALED,
    ),
    *loops(kind=["nesterov", "AdamW"], way="ours", inf="loss", inf_at=0, params=("0.*",), **SCALED),
    *loops(kind=OURS, way="ours", mode=MODES, inf="loss", clip=[None, "loss"], **SCALED),
    *loops(
        way="called",
        implementation=["plain", "fused"],
        inf=[None, "loss", "importance"],
        **SCALED,
    ),
    *loops(way="in the loss", **SCALED),
    *loops(*IN_STEP, dtype=torch.float32, scale=0.0),
    *loops(way=BOTH, mode=MODES, clip="loss", micro=3, inf="loss", **SCALED),
    *loops(kind="AdamW", way=BOTH, inf="importance", around="ZeRO", **SCALED),
    # autocast reaches the loss and not the penalty
    *loops(
        kind="default AdamW",
        way=[*BOTH, "called", "in the loss"],
        dtype=torch.float32,
        autocast=NARROW,
    ),
    *loops(kind="default AdamW", mode="proximal", dtype=torch.float32, autocast=NARROW),
    *loops(dtype=torch.float32, autocast=NARROW, scale=2.0**8, clip="loss"),
    # torch.compile
    Loop(way="in the loss", compiled="loss"),
    Loop(way="called", compiled="addition"),
    Loop(way="called", mode="proximal", compiled="proximal step"),
    *loops(compiled=["optimizer", "all", "model"]),
    Loop(mode="proximal", compiled="optimizer"),
    *loops(way="ours", mode=MODES, compiled="optimizer"),
]


@pytest.mark.parametrize("loop", dict.fromkeys(LOOPS), ids=str)
def test_a_loop_is_the_loop_by_hand(loop: Loop) -> None:
    with ExitStack() as stack:
        if loop.around == "ZeRO":
            stack.enter_context(one_process())
        if loop.compiled:
            torch._dynamo.reset()
            stack.callback(torch._dynamo.reset)
        run(loop)


@pytest.mark.slow
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop.compiled], ids=str)
def test_a_loop_that_inductor_compiles_is_the_loop_by_hand(loop, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "compile_", partial(torch.compile, backend="inductor"))
    torch._dynamo.reset()
    run(loop)
    torch._dynamo.reset()


# -- What is no row --------------------------------------------------------------------------------
def scaled_step(model: nn.Module, optimizer: Any, scaler: Any) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model, X, None)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_without_a_scaler_an_inf_reaches_the_weights_as_by_hand() -> None:
    model, mas = learned(5.0)
    optimizer, _ = optimizer_of(Loop(), list(model.parameters()), mas)
    infinite_importance(mas)
    loss_of(model, X, None).backward()
    optimizer.step()
    assert not model[0].weight.isfinite().all()


@pytest.mark.parametrize("loop", [Loop(implementation="fused"), Loop("AdamW", "ours")], ids=str)
def test_somebody_elses_found_inf_is_raised_too(loop: Loop) -> None:
    """A fused optimizer is told through these attributes, whoever sets them."""
    model, mas = learned(5.0, torch.float32)
    optimizer, _ = optimizer_of(loop, list(model.parameters()), mas)
    infinite_importance(mas)
    loss_of(model, X, None).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    optimizer.step()
    assert optimizer.found_inf == 1
    assert_states_equal(model.state_dict(), before)


@pytest.mark.parametrize(("scale", "overflows"), [(2.0**16, True), (2.0**10, False)])
def test_float16_gradients_under_a_fused_optimizer_find_their_scale(scale, overflows) -> None:
    """They overflow at 65504, though the penalty's are far from it. (torch's scaler takes float16
    gradients of fused optimizers only.)"""
    model, mas = learned(50.0, torch.float16)
    start, protection = copy.deepcopy(model), Protection.of(mas)
    pulls = [protection.gradient(n, p.detach().double()) for n, p in model.named_parameters()]
    assert (max(float(g.abs().max()) for g in pulls) * scale > 65504) == overflows
    optimizer = torch.optim.SGD(model.parameters(), 0.005, fused=True)
    mas.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    hand = HandLoop(
        copy.deepcopy(model).double(),
        protection,
        lambda named: torch.optim.SGD(named.values(), 0.005),
    )
    skips = 0
    for _ in range(12):
        before, had = scaler.get_scale(), copy.deepcopy(model.state_dict())
        scaled_step(model, optimizer, scaler)
        assert all(p.isfinite().all() for p in model.parameters())
        if scaler.get_scale() < before:
            skips += 1
            assert_states_equal(model.state_dict(), had)
        else:
            hand.step([partial(loss_of, x=X, narrow=None)])
    assert scaler.get_scale() == scale / 2**skips
    assert (skips > 0) == overflows
    assert_trained(model, hand.theta, start, 0.05)


def test_a_closure_that_is_called_many_times_gets_the_penalty_each_time() -> None:
    """LBFGS minimises loss + penalty: the same as with a closure that adds it itself."""
    results = []
    for is_attached in (True, False):
        model, mas = learned(5.0)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
        if is_attached:
            mas.attach(optimizer)

        def closure(model=model, mas=mas, optimizer=optimizer, is_attached=is_attached):
            optimizer.zero_grad()
            loss = loss_of(model, X, None)
            if not is_attached:
                loss = loss + mas.penalty()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure)) for _ in range(3)]
        results.append((dict(model.named_parameters()), losses))
    assert_same(results[0][0], results[1][0], 1e-6, 1e-8)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-8)


def test_optimizers_in_backward_report_the_share_of_their_own_parameter() -> None:
    model, mas = learned(5.0)
    whole = mas.penalty().item()
    handles = []
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], 0.05)
        handles.append(mas.attach(optimizer))
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    loss_of(model, X, None).backward()
    assert sum(handle.last_penalty.item() for handle in handles) == pytest.approx(whole)


def test_the_next_task_compiles_nothing() -> None:
    """Neither a new Ω nor a new θ*."""
    torch._dynamo.reset()
    t = Trained(Loop(way="in the loss", compiled="loss"))
    t.take()
    t.take()
    t.mas.consolidate([X])
    t.optimizer.state.clear()
    start = copy.deepcopy(t.model)
    hand = HandLoop(t.model, Protection.of(t.mas), partial(optimizer_by_hand, t.loop))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            t.take()
            hand.step(losses_of(t.loop))
    assert_trained(t.model, hand.theta, start, 1e-10)
    torch._dynamo.reset()


def zero(params: Any, kind: Any, **options: Any) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(params, kind, lr=0.01, **options)


def test_what_zero_cannot_do_is_refused() -> None:
    model, mas = learned()
    with one_process():
        ours = zero(model.parameters(), mas_ext.optim.AdamW, mas=mas)
        with pytest.raises(ValueError, match=r"includes the penalty.*attach\(\)"):
            mas.attach(ours)
        overlapping = zero(model.parameters(), torch.optim.AdamW, overlap_with_ddp=True)
        with pytest.raises(ValueError, match=r"overlap_with_ddp.*leave"):
            mas.attach(overlapping)


# -- States in 8 bits ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "package", ["bitsandbytes.optim", pytest.param("torchao.optim", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")
def test_states_in_8_bits(package, mode) -> None:
    """The gradients are ordinary, and that is where the penalty goes: as if it were called."""
    library, trained = pytest.importorskip(package), []
    for is_attached in (True, False):
        torch.manual_seed(0)
        # Weights large enough (4096 elements) to be kept in 8 bits.
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        x, mas = torch.randn(16, 64), MAS(model, 5.0)
        mas.consolidate([x])
        move(model)
        optimizer = library.AdamW8bit(model.parameters(), lr=0.01, weight_decay=0.01)
        if is_attached:
            mas.attach(optimizer, mode, every=1)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            if not is_attached and mode == "gradient":
                mas.add_penalty_grad_()
            optimizer.step()
            if not is_attached and mode == "proximal":
                mas.proximal_step_(optimizer.param_groups[0]["lr"])
        state = optimizer.state[model[0].weight]
        moment = state["state1"] if "state1" in state else state["exp_avg"].codes
        assert moment.dtype == torch.uint8
        trained.append(model)
    assert_bits(*trained)
