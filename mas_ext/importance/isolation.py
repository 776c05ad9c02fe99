"""Context managers that run a model for a measurement and restore everything afterwards."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_HIDDEN = (
    "None of the inputs have requires_grad=True"  # the start of a warning of torch.utils.checkpoint
)


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Sets evaluation or training mode, and restores the model's state at the end or on an error.

    Restored are every module's mode, every ``requires_grad`` and ``.grad`` (the same tensor with
    the same content), every buffer, and PyTorch's random number generators.
    """
    modules, params = list(model.modules()), list(model.parameters())
    with (
        _random_state(params),
        _buffers(modules),
        _modes(modules, training),
        _gradients(params),
        _eager(),
        _recurrent_backends(modules),
    ):
        yield


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """For forward passes that are differentiated, as they are in training."""
    modules = list(model.modules())
    with _modes(modules, False), _recurrent_backends(modules):
        yield


_graph_readers: list[bool] = []  # not a ContextVar: a device's backward pass has its own thread


@contextmanager
def readable_graph() -> Iterator[None]:
    """For passes whose autograd graph is read: recurrent layers then show each of their steps.

    It must include the backward pass, in which activation checkpointing runs layers again.
    """
    _graph_readers.append(True)
    try:
        yield
    finally:
        _graph_readers.pop()


@contextmanager
def without_a_trace(model: nn.Module) -> Iterator[None]:
    """Restores buffers and PyTorch's random number generators after forward passes."""
    with _random_state(model.parameters()), _buffers(list(model.modules())):
        yield


def _random_state(params: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    devices = {p.device for p in params}
    return torch.random.fork_rng(devices=[one for one in devices if one.type == "cuda"])


def _eager() -> AbstractContextManager[Any]:
    """Compiled code is a single operation, whose parts the graph does not show."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled; loading it is slow
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _recurrent_backends(modules: list[nn.Module]) -> Iterator[None]:
    """Disables, inside recurrent layers only, the backends that a measurement cannot use.

    cuDNN cannot differentiate a recurrent layer in evaluation mode. oneDNN runs a whole layer as a
    single operation, which is faster, and in the way only where the graph is read.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    before: list[tuple[bool, bool]] = []

    def disable(*_: Any) -> None:
        before.append((cudnn.enabled, mkldnn.enabled))
        cudnn.enabled = False
        if _graph_readers:
            mkldnn.enabled = False

    def restore(*_: Any) -> None:
        cudnn.enabled, mkldnn.enabled = before.pop()

    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.RNNBase):
                stack.callback(module.register_forward_pre_hook(disable).remove)
                handle = module.register_forward_hook(restore, always_call=True)
                stack.callback(handle.remove)
        yield


@contextmanager
def differentiable() -> Iterator[None]:
    """Enables gradients, whatever mode the caller is in.

    Use it around each batch rather than around the loop over the data, since a generator of batches
    may change these modes between two batches.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def no_hidden_parameters() -> Iterator[None]:
    """Raises an error where PyTorch only warns that checkpointing drops parameters' gradients.

    Raises:
        ValueError: the model uses reentrant checkpointing on a part whose inputs need no gradient.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_HIDDEN)
        try:
            yield
        except UserWarning as warning:
            if not str(warning).startswith(_HIDDEN):  # the user turned another one into an error
                raise
            raise ValueError(
                "the model uses activation checkpointing with use_reentrant=True, which hides the "
                "parameters inside; use use_reentrant=False"
            ) from warning


@contextmanager
def _modes(modules: list[nn.Module], training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in modules]
    try:
        # model.eval() and train() are not called: a module may override them, to merge weights say.
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _gradients(params: list[nn.Parameter]) -> Iterator[None]:
    before = [(p, p.requires_grad, p.grad) for p in params]
    for p, _, _ in before:
        p.grad = None  # a forward that calls backward then writes to a new tensor
    try:
        yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def _buffers(modules: list[nn.Module]) -> Iterator[None]:
    before = [
        (module, {n: (b, _copy(b)) for n, b in module._buffers.items()}) for module in modules
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, buffers in before:
                for name in module._buffers.keys() - buffers.keys():
                    del module._buffers[name]
                for name, (buffer, content) in buffers.items():
                    module._buffers[name] = buffer
                    _restore(buffer, content)


def _copy(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return None if buffer is None else buffer.detach().clone()


def _restore(buffer: torch.Tensor | None, content: torch.Tensor | None) -> None:
    if buffer is None or content is None or buffer.is_meta:
        return
    if buffer.layout != torch.strided or not torch.equal(buffer, content):
        buffer.copy_(content)


class OperatorObserver(TorchDispatchMode):
    """A dispatch mode that sees every operation, below autograd and autocast, and changes none."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first mode entered loads torch._dynamo, which takes seconds
