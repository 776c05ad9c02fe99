"""The command ``mas-ext``: demo, benchmarks, merging of models, and what a bug report needs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mas_ext import merge
from mas_ext._drift.budget import DEFAULT_LIMIT
from mas_ext._environment import environment

if TYPE_CHECKING:
    from mas_ext.demo import Settings

_DEMO_PACKAGES = ("mlxtend", "matplotlib", "jinja2", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code, which is 0 on success.

    Args:
        argv: the arguments after the program's name; None for those of the process.

    Raises:
        SystemExit: with code 2 after a message about invalid arguments, or with code 0 after
            ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:  # all further arguments are the benchmarks', --help included
        return _bench(words[1:])
    parser = _parser()
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mas-ext", description="Memory Aware Synapses for PyTorch."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="demo | merge | info | bench"
    )
    _add_demo(commands)
    _add_merge(commands)
    info = commands.add_parser(
        "info", help="what was compiled, what runs and where, to paste into a bug report"
    )
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)
    commands.add_parser(
        "bench", help="everything beside its peers, timed; from a clone of the repository"
    )
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="learn a sequence of tasks with and without MAS, and write a report",
        description="Learns tasks in turn with fine-tuning, L2-SP, EWC and MAS, and writes "
        "results.json, accuracy.png, drift.png, importance.png, estimators.png and report.html.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of Settings
    )
    demo.set_defaults(run=_demo, usage_error=demo.error)
    demo.add_argument("--scenario", help="permuted, rotated or split (default: permuted)")
    demo.add_argument(
        "--data", help="bundled: 5,000 digits; torchvision: all of MNIST (default: bundled)"
    )
    demo.add_argument("--root", help="where torchvision keeps MNIST (default: data)")
    demo.add_argument("--tasks", type=int, help="how many (default: 5)")
    demo.add_argument("--epochs", type=int, help="a task (default: the scenario's)")
    demo.add_argument("--lr", type=float, help="Adam's learning rate (default: the scenario's)")
    demo.add_argument("--batch-size", type=int, help="default: 64")
    demo.add_argument(
        "--budget",
        type=float,
        help="how far a task may change what was learned, in nats per prediction "
        f"(default: {DEFAULT_LIMIT:g})",
    )
    demo.add_argument(
        "--lambda",
        dest="lambda_reg",
        type=_strength,
        help="a fixed λ for MAS in gradient mode, or auto: from drift, without a budget (default: "
        "as the budget needs it)",
    )
    demo.add_argument("--lambda-proximal", type=_strength, help="the same for MAS's proximal step")
    demo.add_argument(
        "--drift",
        type=float,
        help="for λ auto: how far a task may change the output, as a fraction (default: 0.2)",
    )
    demo.add_argument(
        "--sweep", action="store_true", help="try fixed λ and other budgets, too (a minute more)"
    )
    demo.add_argument(
        "--state-dtype", help="what Ω is kept in: float32, bfloat16 or uint8 (default: float32)"
    )
    demo.add_argument(
        "--importance-samples", type=int, help="images a task to measure Ω on (default: all)"
    )
    demo.add_argument("--seed", type=int, help="default: 0")
    demo.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="any of finetune, l2sp, ewc, mas_proximal, mas (default: all)",
    )
    demo.add_argument("--out", default="mas-demo", help="folder for the report (default: mas-demo)")
    demo.add_argument("--quiet", action="store_true", default=False, help="no progress bars")


def _add_merge(commands: Any) -> None:
    command = commands.add_parser(
        "merge",
        help="average models that share an ancestor, weighted by importance",
        description="Writes the average of models that share an ancestor, weighted by the "
        "importance of each parameter in each model.",
    )
    command.set_defaults(run=_merge)
    command.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="safetensors files, or folders that save_pretrained wrote",
    )
    command.add_argument(
        "--importances",
        nargs="+",
        metavar="STATE",
        help="for each model, the file that MAS.save or EWC.save wrote (default: a plain average)",
    )
    command.add_argument("--out", required=True, help="the safetensors file to write")
    command.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="how much each model counts (default: all the same)",
    )


def _strength(word: str) -> float | str:
    """λ from the command line: a number, or ``auto``."""
    return word if word == "auto" else float(word)


def _demo(arguments: argparse.Namespace) -> int:
    missing = [name for name in _DEMO_PACKAGES if find_spec(name) is None]
    if missing:
        return _fail(f'the demo needs {", ".join(missing)}: run  pip install "mas_ext[demo]"')
    from mas_ext.demo import run_demo
    from mas_ext.demo.table import show

    out = Path(arguments.out)
    try:
        settings = _settings(arguments)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; name a folder")
    except ValueError as error:
        arguments.usage_error(str(error))
    try:
        run = run_demo(settings, out, progress=not arguments.quiet)
    except (ImportError, OSError, RuntimeError) as error:
        return _fail(str(error))
    show(run, out)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    models, out = arguments.models, arguments.out
    try:
        importances = arguments.importances or [{}] * len(models)
        merge(models, importances, weights=arguments.weights, out=out)
    except (OSError, TypeError, ValueError) as error:
        return _fail(str(error))
    print(f"{out}: {len(models)} models, merged")
    return 0


def demo_settings(words: Sequence[str]) -> Settings:
    """The settings that a command line means; ``words`` begins with ``demo``."""
    return _settings(_parser().parse_args(words))


def _settings(arguments: argparse.Namespace) -> Settings:
    from mas_ext.demo import Settings

    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "methods" in given:
        given["methods"] = tuple(given["methods"])
    return Settings(**given)


def _info(arguments: argparse.Namespace) -> int:
    found = environment()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_as_list({"mas_ext": found.pop("version"), **found})))
    return 0


def _as_list(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The lines of a Markdown list, which reads as well in plain text."""
    for name, value in values.items():
        label = name if name == "mas_ext" else name.replace("_", " ")
        if isinstance(value, dict):
            yield f"{indent}- {label}:"
            yield from _as_list(value, indent + "  ")
        else:
            yield f"{indent}- {label}: {_in_words(value)}"


def _in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)


def _bench(words: list[str]) -> int:
    if not Path("benchmarks", "__main__.py").is_file():
        return _fail(
            "there is no benchmarks package here; the benchmarks are part of the repository and "
            "not of the installed package: run this from a clone of it"
        )
    # A separate process: python -m puts the working directory on its path.
    return subprocess.run([sys.executable, "-m", "benchmarks", *words], check=False).returncode


def _fail(message: str) -> int:
    print(f"mas-ext: {message}", file=sys.stderr)
    return 1
