"""Exact importance, Σ_k |∂s_k/∂θ|, from one backward pass over a batch.

``graph.py`` reads the autograd graph; ``plan.py`` finds where parameters are used, ``views.py``
and ``subgraph.py`` what is made from them on the way there, ``owners.py`` and ``layout.py`` whose
rows are whose. ``visits.py`` runs a backward pass, ``accumulation.py`` the one that counts:
``rules.py`` (with ``convolution.py`` and ``generic.py``) says what each operation contributes, and
``contributions.py`` and ``groups.py`` add it up. ``selfcheck.py`` compares with autograd, and
``engine.py`` puts it together.
"""

from mas_ext.importance.per_sample.engine import add_batch

__all__ = ["add_batch"]
