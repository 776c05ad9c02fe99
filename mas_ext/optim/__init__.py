r"""Optimizers whose step includes the penalty: one pass over memory for both.

Change one line of your training loop, and attach nothing::

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = mas_ext.optim.AdamW(model.parameters(), lr=1e-3, mas=mas)

Except for :meth:`step` they are torch's classes: arguments and their order, parameter groups,
schedulers, ``state_dict()`` (interchangeable with that of torch's class), pickling, and
``torch.amp.GradScaler``, with which they behave as torch's fused optimizers do. Parameters that the
MAS protects take the fused step; all others take torch's own fused step, and so do all parameters
until the first task is consolidated. A parameter without a gradient stays as it is.

The penalty's gradient is added inside the step, after any clipping and unscaling, as with
``mas.attach(optimizer)``. There are two differences. ``p.grad`` is only read: after the step it
still holds the loss's gradient (scaled, under a ``GradScaler``). And ``maximize=True`` ascends the
loss and descends the penalty. Under a ``GradScaler`` the penalty's gradient is computed once more
before the step, so that an Inf in it skips the step and lowers the scale.

=============  =================================================================================
``mas``        the :class:`mas_ext.MAS`, EWC or L2SP; its Ω, θ* and λ are read in every step
``mode``       ``"gradient"`` or ``"proximal"``, as in :meth:`mas_ext.MAS.attach`
``foreach``    not available: None or False
``fused``      always on: None or True
=============  =================================================================================

``optimizer.last_penalty`` is the penalty of the parameters that the last step moved, a 0-dim tensor
(at θ before the step; in ``"proximal"`` mode after it), or None before the first step. Nothing
waits for the device, so a step can be captured in a CUDA graph; a learning rate that changes must
be a tensor there.
"""

from mas_ext.optim.adam import Adam, AdamW
from mas_ext.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
