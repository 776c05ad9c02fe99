"""How much each parameter matters to a network's output, measured from unlabelled data.

``estimate.py`` runs an estimator over the data; ``estimators.py`` has the estimators,
``objectives.py`` what they differentiate, ``batches.py`` how data becomes outputs, and
``isolation.py`` how the model is left as it was.
"""

from mas_ext.importance.estimate import Importance, estimate_importance, sum_importance

__all__ = ["Importance", "estimate_importance", "sum_importance"]
