"""How much each parameter matters to a network's output, measured from unlabelled data.

``estimate.py`` is the public function; ``spread.py`` has all processes take part, and ``loop.py``
runs an estimator over the data of one; ``estimators.py`` has the estimators,
``per_sample/`` the exact one and ``local.py`` (with ``uses.py``) the forward-only one,
``estimation.py`` what they work with, ``objectives.py`` what they differentiate, ``batches.py`` how
data becomes outputs, ``watching.py`` what is seen of a forward pass, and ``isolation.py`` how the
model is left as it was.
"""

from mas_ext.importance.data_parallel import add_importance_
from mas_ext.importance.estimate import Importance, estimate_importance

__all__ = ["Importance", "add_importance_", "estimate_importance"]
