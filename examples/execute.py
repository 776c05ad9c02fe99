"""Executes a notebook in place: `python examples/execute.py examples/AMS_Train.ipynb`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main(path: Path) -> None:
    """Runs all cells in order and stops at the first error."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this run: noise in a diff
    nbformat.write(notebook, path)
    print(f"{path}: {len(notebook.cells)} cells executed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
