"""Jobs that are one pass over lists of tensors, where memory decides; each beside its roofline.

``penalty.py``, ``accumulate.py``, ``proximal.py`` and ``steps.py`` have the ways to do a job side
by side; ``shapes.py`` what they are given, ``measure.py`` checks and times them, ``show.py`` and
``plot.py`` show the results. Another job is another such module, and its name in ``JOBS``.
"""

from benchmarks.lists import accumulate, penalty, proximal, steps
from benchmarks.lists.entry import entry

JOBS = {job.name: job for job in (penalty.JOB, accumulate.JOB, proximal.JOB, *steps.JOBS)}
ENTRIES = tuple(entry(job) for job in JOBS.values())

__all__ = ["ENTRIES", "JOBS"]
