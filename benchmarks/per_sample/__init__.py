"""``python -m benchmarks per_sample``: what exact importance costs, beside everything like it.

``workloads.py`` has the models, ``providers.py`` the ways to compute Ω of one batch, ``measure.py``
checks and times them, ``memory.py`` weighs them, ``report.py`` and ``plot.py`` show the results.
"""

from benchmarks.per_sample.report import ENTRY
from benchmarks.per_sample.workloads import QUICK, WORKLOADS

__all__ = ["ENTRY", "QUICK", "WORKLOADS"]
