"""The demo: learns digits as a sequence of tasks, with and without Memory Aware Synapses.

From a notebook::

    from mas_ext.demo import Settings, run_demo
    run = run_demo(Settings(scenario="rotated", epochs=4), out="runs/rotated")
    run.results["methods"]["mas"]["average_accuracy"]

From a shell: ``mas-ext demo --help``. The demo needs ``pip install "mas_ext[demo]"``.
"""

from mas_ext.demo.results import Run
from mas_ext.demo.run import run_demo
from mas_ext.demo.settings import Settings

__all__ = ["Run", "Settings", "run_demo"]
