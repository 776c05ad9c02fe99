"""Running a model for a measurement that must leave no trace."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_HIDDEN = "None of the inputs have requires_grad=True"  # what torch's checkpointing warns of


@contextmanager
def undisturbed(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Evaluation or training mode, after which everything is as it was, also after an error.

    Put back: every module's mode, every ``requires_grad`` and ``.grad`` (the same tensor with the
    same content), every buffer, and PyTorch's random number generators.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        stack.enter_context(_modes(model, training))
        stack.enter_context(_gradients(model))
        stack.enter_context(_buffers(model))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and it takes long to load
            # Compiled code is one operation whose inside cannot be seen.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            # cuDNN cannot differentiate a recurrent layer in evaluation mode, and a recurrent layer
            # that oneDNN runs is one operation.
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients, wherever the caller is. Around each batch, not around the loop over the data: a
    generator can leave its own modes switched on.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def no_hidden_parameters() -> Iterator[None]:
    """Refuses what PyTorch only warns of: checkpointing that drops gradients of parameters.

    Raises:
        ValueError: reentrant checkpointing of a part whose input needs no gradient.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_HIDDEN)
        try:
            yield
        except UserWarning as warning:
            if not str(warning).startswith(_HIDDEN):  # one that the user turned into an error
                raise
            raise ValueError(
                "the model uses activation checkpointing with use_reentrant=True, which hides the "
                "parameters inside; use use_reentrant=False"
            ) from warning


@contextmanager
def _modes(model: nn.Module, training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        # Not model.eval() or train(): a module may do more in it, such as merge weights.
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in before:
        p.grad = None  # a forward that calls backward itself then writes to a tensor of its own
    try:
        yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    before = [
        (module, {n: (b, _copy(b)) for n, b in module._buffers.items()})
        for module in model.modules()
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
    """A mode that sees every operation, below autograd and autocast, and changes none."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first of all modes loads torch._dynamo, which takes two seconds
