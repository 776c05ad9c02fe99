"""Predictions for GPUs, not measurements: what a call must move, and how long that should take.

``gpus.py`` has the data sheets, ``traffic.py`` what every way of doing a job reads and writes,
``launches.py`` how it is cut into kernels, ``model.py`` the time that follows, ``abs_matmul.py``
the same for the one operator that is bound by arithmetic. They need the standard library only, so
that whatever measures on a GPU can put the prediction beside the measurement:

    from benchmarks.predict import evenly, find_gpu, predict

    gpu = find_gpu(torch.cuda.get_device_name())  # None where the data sheet is not known
    sizes = [p.numel() for p in params]           # or evenly(numel, tensors)
    print(predict("add_penalty_grad_", "mas_ext", "float32", sizes, gpu))

``count.py`` and ``ways.py`` (torch) count the traffic that ``traffic.py`` states; ``report.py`` and
``plot.py`` are ``python -m benchmarks predict``.
"""

from benchmarks.predict.abs_matmul import Problem, predict_abs_matmul
from benchmarks.predict.gpus import GPUS, Gpu, find_gpu
from benchmarks.predict.model import Prediction, evenly, predict
from benchmarks.predict.traffic import JOBS

__all__ = [
    "GPUS",
    "JOBS",
    "Gpu",
    "Prediction",
    "Problem",
    "evenly",
    "find_gpu",
    "predict",
    "predict_abs_matmul",
]
