"""Exact importance, Σ_k |∂s_k/∂θ|, from one backward pass over a batch.

``graph.py`` reads the autograd graph, ``plan.py`` finds where it takes parameters in, ``layout.py``
whose rows are whose, ``views.py`` what is a view of a parameter; ``passes.py`` runs the backward
pass, ``rules.py`` (with ``convolution.py`` and ``generic.py``) says what each operation contributes
and ``contributions.py`` and ``groups.py`` add it up; ``selfcheck.py`` compares with autograd, and
``engine.py`` puts it together.
"""

from mas_ext.importance.per_sample.engine import add_batch

__all__ = ["add_batch"]
