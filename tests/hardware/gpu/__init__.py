"""Everything about the CUDA kernels that needs a card: ``python -m tests.hardware.gpu``, ``make gpu``.

``__main__`` runs the steps that ``steps`` lists, each in a process of its own; a step is a module
with ``run(session)``, which fills a :class:`tests.hardware.gpu.checks.Session`. Nothing here needs more than
torch, nvcc and pytest. With ``--device cpu`` the same code runs as a rehearsal, as far as it goes.
"""
