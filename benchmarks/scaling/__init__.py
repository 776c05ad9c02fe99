"""How time grows: with parameters, tensors, tasks, the batch and the length of a sequence.

``axes.py`` has what grows and the ways that are timed along it, ``report.py`` measures and shows,
``plot.py`` draws one log-log panel an axis.
"""

from benchmarks.scaling.report import ENTRY

__all__ = ["ENTRY"]
