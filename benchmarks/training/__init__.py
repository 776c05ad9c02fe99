"""End to end: what MAS adds to a real training step, and what the end of a task costs.

``models.py`` has the models, ``setting.py`` the middle of a second task, ``ways.py`` the ways to
train in it, ``task_end.py`` the ways to end a task, ``measure.py`` checks and times both,
``report.py`` and ``plot.py`` show the results.
"""

from benchmarks.training.report import ENTRY

__all__ = ["ENTRY"]
