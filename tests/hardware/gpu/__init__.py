"""Everything that needs a GPU: ``python -m tests.hardware.gpu``, or ``make gpu``.

``__main__`` runs the steps that ``steps`` lists, each by pytest in a process of its own, and writes
a report. Their files do not begin with ``test_``, so that no other run collects them.
Nothing here needs more than torch, nvcc, a C++ compiler and pytest. With ``--device cpu`` the same
code runs as a rehearsal, over a stand-in for the card.
"""
