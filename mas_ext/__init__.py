"""Memory Aware Synapses for PyTorch: exact importance, and a penalty at the speed of memory.

    mas = mas_ext.MAS(model, lambda_reg=1.0)
    mas.attach(optimizer)            # the training loop stays as it is
    ...
    mas.consolidate(data)            # at the end of a task; labels are not used

See :class:`MAS`, :func:`estimate_importance`, :func:`preset` (what other implementations compute),
:mod:`mas_ext.optim` (optimizers whose step includes the penalty), :mod:`mas_ext.functional` (the
operators on lists of tensors), :mod:`mas_ext.reference` (the same in plain PyTorch) and
:func:`build_info`.
"""

from mas_ext import functional, optim, reference
from mas_ext._operators.native import build_info
from mas_ext._version import __version__
from mas_ext.importance import Importance, estimate_importance
from mas_ext.presets import Preset, preset
from mas_ext.regularizer import MAS

__all__ = [
    "MAS",
    "Importance",
    "Preset",
    "__version__",
    "build_info",
    "estimate_importance",
    "functional",
    "optim",
    "preset",
    "reference",
]
