"""Memory Aware Synapses for PyTorch: exact importance, and a penalty at the speed of memory.

    mas = mas_ext.MAS(model, budget=0.08)
    mas.attach(optimizer, mode="proximal")  # the training loop stays as it is
    ...
    mas.settle()                            # at the end of a task: the drift is at most 0.08
    mas.consolidate(data)                   # measures the importance; labels are not used

See :class:`MAS`, :class:`EWC`, :class:`L2SP`, :class:`DriftBudget`, :func:`estimate_importance`,
:func:`merge` (models that share an ancestor), :func:`preset` (what other implementations compute),
:mod:`mas_ext.optim` (optimizers whose step includes the penalty), :mod:`mas_ext.functional` (the
operators on lists of tensors), :mod:`mas_ext.reference` (the same in plain PyTorch) and
:func:`build_info`.
"""

from mas_ext import functional, optim, reference
from mas_ext._drift.budget import DriftBudget
from mas_ext._drift.settling import Settled
from mas_ext._drift.tracker import DriftRecord
from mas_ext._operators.native import build_info
from mas_ext._version import __version__
from mas_ext.importance import Importance, estimate_importance
from mas_ext.merging import merge
from mas_ext.presets import Preset, preset
from mas_ext.regularizer import EWC, L2SP, MAS

__all__ = [
    "EWC",
    "L2SP",
    "MAS",
    "DriftBudget",
    "DriftRecord",
    "Importance",
    "Preset",
    "Settled",
    "__version__",
    "build_info",
    "estimate_importance",
    "functional",
    "merge",
    "optim",
    "preset",
    "reference",
]
