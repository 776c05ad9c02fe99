"""Everything that needs a GPU: ``python -m tests.hardware.gpu``, or ``make gpu``.

``__main__`` runs the steps that ``steps`` lists, each in a process of its own. A step is a module
with ``run(session)``, which records checks and tables in a :class:`checks.Session`.
Nothing here needs more than torch, nvcc and pytest. With ``--device cpu`` the same code runs as a
rehearsal, as far as it can.
"""
