"""Several processes (gloo): the tests, and beside them the programs that the processes run."""
