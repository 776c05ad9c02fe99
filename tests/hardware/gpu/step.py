"""Runs one step in this process: ``python -m tests.hardware.gpu.step NAME DEVICE FILE``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from tests.hardware.gpu.checks import Session


def main(name: str, device: str, file: str) -> None:
    session = Session(device, Path(file))
    session.write()
    import_module(f"tests.hardware.gpu.{name}").run(session)
    session.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
