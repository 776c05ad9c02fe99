"""How much each parameter matters to a network, measured from data.

``estimate.py`` has the public function and ``options.py`` its options. ``data_parallel.py`` has all
processes take part (``sharded.py`` for a model that does not fit one of them), and ``loop.py`` runs
an estimator over the data of one, with progress saved by ``measurement_checkpoint.py``.

``estimators.py`` lists the estimators: ``per_sample/`` is the exact one, and ``local.py`` (with
``layer_calls.py``) needs forward passes only. Both express what they add by ``contributions.py``
and ``convolution.py``, and ``reductions.py`` says how a sample's gradient counts. ``estimation.py``
is the state that estimators work on, ``criteria.py`` (with ``objectives.py``) what they
differentiate, ``outputs.py`` which of the model's outputs count, ``batches.py`` how the model is
run on data, and ``isolation.py`` how the model is left as it was.
"""

from mas_ext.importance.contributions import EmbeddingRows, MatrixProduct
from mas_ext.importance.data_parallel import add_importance_
from mas_ext.importance.estimate import Importance, estimate_importance
from mas_ext.importance.options import CheckpointedMeasurementOptions, MeasurementOptions
from mas_ext.importance.per_sample.rules import NoRule, VisitedOperation, register_rule

__all__ = [
    "CheckpointedMeasurementOptions",
    "EmbeddingRows",
    "Importance",
    "MatrixProduct",
    "MeasurementOptions",
    "NoRule",
    "VisitedOperation",
    "add_importance_",
    "estimate_importance",
    "register_rule",
]
