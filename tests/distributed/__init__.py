"""Programs that several processes run together: ``launch.py`` starts them, ``worker.py`` is one.

Starting processes takes longer than what they check, so that one start runs all the checks of a
module: its functions ``check_…(world)``, in their order. ``models.py`` has what is checked, and the
oracle.
"""
