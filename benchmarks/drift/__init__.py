"""What a drift does that a λ does not: one number for many problems.

``problems.py`` is what is learned, with the networks of ``networks.py``; ``learning.py`` learns one
sequence of tasks, ``study.py`` all of them with every strength, ``summary.py`` says what that comes
to, in tables (``report.py``) and plots (``plot.py``).
"""

from benchmarks.drift.report import ENTRY

__all__ = ["ENTRY"]
