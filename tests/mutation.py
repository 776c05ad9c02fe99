"""``python -m tests.mutation``: plants faults in the package one by one, and counts those caught.

A sample of small faults in the Python package and in the CPU kernels: a comparison or an operator
swapped, a number changed, a condition inverted, a call or a ``raise`` left out. Which ones are
planted depends on what a statement says and not on where it stands or what its names are, so that
two versions of the code can be compared. Each fault runs only the tests that execute its line, the
fastest first, which ``python -m tests.mutation --measure`` records.

The faults in the CUDA kernels are in ``tests/hardware/simt/mutants.py``.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PYTHON_ONE_IN, CPP_ONE_IN = 14, 22  # how many of all possible faults are planted
# Tested by several processes or whole programs, which leave no trace of the lines they execute.
LEFT_OUT = ("demo/", "_distributed/", "cli.py", "__main__.py", "integrations/")
SECONDS, TESTS = 20.0, 200  # of tests per fault
PROCESSES = multiprocessing.get_context("forkserver")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd,
}  # fmt: skip
CPP_FAULTS = [
    (r"(?<=[\w)\]]) \+ (?=[\w(])", " - "), (r"(?<=[\w)\]]) - (?=[\w(])", " + "),
    (r"(?<=[\w)\]]) \* (?=[\w(])", " / "), (r"(?<=[\w)\]]) / (?=[\w(])", " * "),
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" == ", " != "), (r" != ", " == "),
    (r" && ", " || "), (r" \|\| ", " && "), (r" \+= ", " -= "), (r"\bstd::abs\(", "("),
    (r"\bif \(", "if (!!0 && "),
]  # fmt: skip
CPP_LEFT_OUT = ("checks.h", "arguments.h", "overlap.h", "multiversion.h")  # refusals, SIMD levels
CPP_TESTS = ("operators", "precision")


@dataclass(frozen=True)
class Fault:
    """A file with one statement changed."""

    file: str
    line: int
    key: str  # the same for the same fault in another version of the code
    before: str
    after: str
    text: str


# -- which faults --------------------------------------------------------------------------------


def _is_planted(key: str, one_in: int) -> bool:
    return int(hashlib.sha1(key.encode()).hexdigest(), 16) % one_in == 0


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Faulty replacements of an expression or a statement."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = COMPARISONS[type(node.ops[0])]()
        yield "compare", ast.Compare(node.left, [other, *node.ops[1:]], node.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield "operator", ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and/or", ast.BoolOp(other, node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield "unary", node.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "bool", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "number", ast.Constant(node.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)):
        kind = type(node)
        yield "condition", kind(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    if isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "left out", ast.Pass()


def _without_names(node: ast.AST) -> str:
    text = ast.dump(node)
    return re.sub(r"(id|attr|arg|name)='\w+'", r"\1", text)


def python_faults(root: Path) -> Iterator[Fault]:
    for path in sorted((root / "mas_ext").rglob("*.py")):
        inside = str(path.relative_to(root / "mas_ext"))
        if not inside.startswith(LEFT_OUT):
            yield from _faults_of(path, f"mas_ext/{inside}")


def _faults_of(path: Path, name: str) -> Iterator[Fault]:
    source = path.read_text()
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        annotations = {id(n) for a in ast.walk(function.args) for n in ast.walk(a)}
        for statement in function.body[ast.get_docstring(function) is not None :]:
            for count, node in enumerate(ast.walk(statement)):
                if id(node) in annotations or isinstance(node, ast.FunctionDef):
                    continue
                for kind, changed in _changes(node):
                    key = f"{kind} {count} {_without_names(statement)}"
                    if _is_planted(key, PYTHON_ONE_IN):
                        yield _python_fault(source, name, node, changed, key)


def _python_fault(source: str, name: str, node: ast.AST, changed: ast.AST, key: str) -> Fault:
    before = ast.get_source_segment(source, node)
    after = ast.unparse(ast.fix_missing_locations(changed))
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    if isinstance(changed, ast.If):
        after = after.replace("\n", "\n" + " " * node.col_offset)
    elif isinstance(node, ast.expr):
        after = f"({after})"
    data = source.encode()
    text = (data[:start] + after.encode() + data[end:]).decode()
    short = before.splitlines()[0], after.splitlines()[0]
    digest = hashlib.sha1(key.encode()).hexdigest()[:10]
    return Fault(name, node.lineno, digest, *short, text)


def cpp_faults(root: Path) -> Iterator[Fault]:
    for path in sorted([*root.glob("csrc/*.h"), *root.glob("csrc/cpu/*")]):
        if path.name not in CPP_LEFT_OUT:
            yield from _cpp_faults_of(path, str(path.relative_to(root)))


def _cpp_faults_of(path: Path, name: str) -> Iterator[Fault]:
    source = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(source):
        code = line.split("//")[0]
        if "template" in code or "#" in code:
            continue
        for pattern, after in CPP_FAULTS:
            for count, match in enumerate(re.finditer(pattern, code)):
                key = f"{pattern} {count} {re.sub(r'[a-z_]{3,}', 'x', code.strip())}"
                if _is_planted(key, CPP_ONE_IN):
                    changed = (code[: match.start()] + after + code[match.end() :]).rstrip()
                    text = "".join([*source[:number], changed + "\n", *source[number + 1 :]])
                    digest = hashlib.sha1(key.encode()).hexdigest()[:10]
                    yield Fault(name, number + 1, digest, code.strip(), changed.strip(), text)


# -- which tests ---------------------------------------------------------------------------------


def measure(root: Path, record: Path, arguments: list[str]) -> None:
    """Records which tests execute which line, and how long they take."""
    environment = {**os.environ, "COVERAGE_FILE": str(record), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--cov=mas_ext", "--cov-context=test"]
    command += ["--cov-report=", "--durations=0", "--durations-min=0.001", *arguments]
    with open(record.with_suffix(".txt"), "w") as log:
        subprocess.run(command, cwd=root, env=environment, stdout=log, check=False)


class Tests:
    """Which tests execute a line."""

    def __init__(self, record: Path) -> None:
        self._durations: dict[str, float] = defaultdict(float)
        for line in record.with_suffix(".txt").read_text().splitlines():
            if match := re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*)$", line):
                self._durations[match[2]] += float(match[1])
        self._lines: dict[str, dict[int, set[int]]] = {}
        database = sqlite3.connect(record)
        self._contexts = dict(database.execute("select id, context from context"))
        paths = dict(database.execute("select id, path from file"))
        from coverage.numbits import numbits_to_nums

        for file, context, bits in database.execute(
            "select file_id, context_id, numbits from line_bits"
        ):
            name = "mas_ext/" + paths[file].split("/mas_ext/")[-1]
            lines = self._lines.setdefault(name, defaultdict(set))
            for line in numbits_to_nums(bits):
                lines[line].add(context)

    def of(self, fault: Fault) -> list[str]:
        """Those that execute the fault's line: the fastest of each file, then the fastest."""
        found = {self._contexts[c] for c in self._lines.get(fault.file, {}).get(fault.line, ())}
        names = {name.removesuffix("|run") for name in found if name.endswith("|run")}
        ordered = sorted(names, key=lambda name: (self._durations[name], name))
        by_file: dict[str, int] = defaultdict(int)
        ranked = []
        for name in ordered:
            by_file[name.split("::")[0]] += 1
            ranked.append((by_file[name.split("::")[0]], self._durations[name], name))
        chosen, seconds = [], 0.0
        for _, duration, name in sorted(ranked):
            if len(chosen) < TESTS and (not chosen or seconds + duration <= SECONDS):
                chosen.append(name)
                seconds += duration
        return chosen


# -- running -------------------------------------------------------------------------------------


def _copy(root: Path) -> Path:
    to = Path(tempfile.mkdtemp(prefix="mutation")) / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "out", "results")
    return Path(shutil.copytree(root, to, ignore=ignored, symlinks=True))


def _run_pytest(tree: Path, tests: list[str]) -> None:
    """In a process of its own, where torch has been imported and this package has not."""
    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]  # that of the tree from which this program was started
    sys.path.insert(0, str(tree))
    with open("pytest.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        import pytest

        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
    os._exit(int(code))


def _pytest(tree: Path, tests: list[str]) -> str:
    process = PROCESSES.Process(target=_run_pytest, args=(tree, tests))
    process.start()
    process.join(40 + 6 * SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "caught (hangs)"
    if process.exitcode == 0:
        return "missed"
    lines = (tree / "pytest.txt").read_text(errors="replace").splitlines()
    last = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "caught: " + (last[0].split(" - ")[0][:150] if last else f"exit {process.exitcode}")


def run(root: Path, faults: list[Fault], tests: Tests | None, out: Path, workers: int) -> None:
    """Plants every fault, and writes down what became of it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    PROCESSES.set_forkserver_preload(["torch", "pytest", "hypothesis", "torch.distributed"])
    trees = [_copy(root) for _ in range(workers)]
    if tests is None and _pytest(trees[0], _cpp_tests(trees[0])) != "missed":
        raise RuntimeError(f"the tests fail without a fault: see {trees[0]}/pytest.txt")
    done = json.loads(out.read_text()) if out.exists() else {}

    def plant(fault: Fault) -> None:
        name = f"{fault.file}:{fault.line} {fault.key}"
        if name in done:
            return
        tree = trees.pop()
        original = (root / fault.file).read_text()
        try:
            (tree / fault.file).write_text(fault.text)
            if fault.file.startswith("csrc"):
                verdict = _built(tree) or _pytest(tree, [*_cpp_tests(tree)])
            else:
                chosen = tests.of(fault) if tests else []
                verdict = _pytest(tree, chosen) if chosen else "missed (no test runs it)"
        finally:
            (tree / fault.file).write_text(original)
            trees.append(tree)
        done[name] = [verdict, fault.before, fault.after]
        print(
            f"{len(done)}/{len(faults)} {name}: {fault.before} -> {fault.after}: {verdict}",
            flush=True,
        )
        out.write_text(json.dumps(done, indent=1))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(plant, faults))
    caught = sum(verdict.startswith("caught") for verdict, *_ in done.values())
    print(f"{caught} of {len(done)} faults caught")


def _built(tree: Path) -> str | None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    environment = {**os.environ, "MAS_EXT_CUDA": "0", "MAS_EXT_NATIVE": "1"}
    built = subprocess.run(command, cwd=tree, env=environment, capture_output=True, check=False)
    return "caught (does not compile)" if built.returncode else None


def _cpp_tests(tree: Path) -> list[str]:
    return [
        str(path.relative_to(tree))
        for path in sorted((tree / "tests").rglob("test_*.py"))
        if any(word in str(path) for word in CPP_TESTS) and "hardware" not in str(path)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd())
    parser.add_argument("--record", type=Path, default=Path("out/mutation/coverage.db"))
    parser.add_argument("--out", type=Path, default=Path("out/mutation/results.json"))
    parser.add_argument("--measure", action="store_true", help="record which tests run which line")
    parser.add_argument("--kernels", action="store_true", help="the CPU kernels, not the package")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true")
    options, rest = parser.parse_known_args()
    root = options.root.resolve()
    if options.measure:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        measure(root, options.record.resolve(), rest)
        return
    faults = list((cpp_faults if options.kernels else python_faults)(root))
    if options.list:
        for fault in faults:
            print(f"{fault.file}:{fault.line} {fault.key}: {fault.before} -> {fault.after}")
        print(len(faults))
        return
    tests = None if options.kernels else Tests(options.record)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    run(root, faults, tests, options.out, options.workers)


if __name__ == "__main__":
    main()
