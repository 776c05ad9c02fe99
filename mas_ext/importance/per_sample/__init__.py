"""Exact importance, Σ_k |∂s_k/∂θ|, from one backward pass over a batch.

``graph.py`` reads the autograd graph and runs backward passes over it. ``plan.py`` finds where
parameters are used, and ``parameter_graph.py`` how what is used is made from parameters.
``sample_assignment.py`` finds out which row of a gradient belongs to which sample, described by
``layout.py``. ``rules.py`` and ``generic.py`` say what each operation contributes, and
``accumulation.py`` adds it up. ``self_check.py`` compares with ordinary autograd, and
``engine.py`` puts everything together.
"""

from mas_ext.importance.per_sample.engine import add_batch

__all__ = ["add_batch"]
