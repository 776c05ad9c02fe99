"""Exact importance, Σ_k f(∂s_k/∂θ), from one backward pass per batch and target.

- ``graph.py`` reads the autograd graph and runs backward passes over it.
- ``plan.py`` finds where parameters are used; ``parameter_graph.py`` finds how the tensors used
  there are computed from the parameters.
- ``sample_assignment.py`` finds which sample each row of a gradient belongs to; ``layout.py``
  describes the result.
- ``rules.py`` registers the rules that form per-sample gradients, ``builtin_rules.py`` has those
  for PyTorch's operations, and ``generic.py`` serves operations without a rule.
- ``accumulation.py`` adds up the contributions of a batch.
- ``self_check.py`` compares the result with ordinary autograd.
- ``engine.py`` puts everything together.
"""

from mas_ext.importance.per_sample import builtin_rules as _builtin_rules  # noqa: F401 (registers)
from mas_ext.importance.per_sample.engine import add_target, output

__all__ = ["add_target", "output"]
