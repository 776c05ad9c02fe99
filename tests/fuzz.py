"""``python -m tests.fuzz``: loads files with faults in them, in every way that mas_ext loads files.

Each file must either be refused, with an error that the documentation names and with everything as
it was, or give the tensors that are in it, checked. Files are loaded in a process of their own, so
that a crash is seen, with a limit on its memory. A case is the name of a loader and a number, from
which its faults are drawn: ``--only uint8:17`` repeats one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mas_ext import EWC, L2SP, MAS, DriftBudget, merge
from mas_ext._state import checkpoint
from tests.support.mutated import mutated, mutated_json, tensors_of
from tests.support.zoo.small import convnet, images, mlp, vectors

COUNT = 10_500
SECONDS = 5.0  # of the processor that one file may take
HUNG = 120.0  # seconds until the process is ended
ROOM = 64 * 2**20  # bytes that loading may take up, beside a multiple of the file's
MULTIPLE = 6
LIMIT = 2**30  # of the address space, beyond what the process has before the first file
X = vectors(dtype=torch.float32)


# -- What is loaded --------------------------------------------------------------------------------
@dataclass
class Loader:
    """One way to load a file.

    Attributes:
        content: an intact file.
        load: loads a file and returns what it has given.
        remembered: what an error must leave as it was.
        reset: puts it back after a file has been loaded.
        check: raises AssertionError unless this result of a file with this content makes sense.
        errors: that the documentation names.
        has_checksum: whether the file has one.
        mutated: makes the file with faults.
    """

    content: bytes
    load: Callable[[Path], Any]
    remembered: Callable[[], Any]
    reset: Callable[[], None]
    check: Callable[[Any, bytes], None]
    errors: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)
    has_checksum: bool = True
    mutated: Callable[[bytes, Random], tuple[bytes, str, bool]] = mutated


def used(make: Callable[[], Any], data: Any = X, tasks: int = 2, is_open: bool = True) -> Any:
    """A regularizer after some tasks, in the middle of another."""
    mas = make()
    for task in range(tasks):
        mas.consolidate([data])
        move(mas.protected.index.model, task)
    if is_open:
        mas.update_importance([data[:3]])
    return mas


def of_a_state(folder: Path, make: Callable[[], Any], data: Any = X, **options: Any) -> Loader:
    """``load`` of a regularizer."""
    saved = used(make, data, **options)
    saved.save(folder / "saved")
    mas = used(make, data, tasks=1)
    with torch.no_grad():  # as at the end of the saved one's training: an adapter's base is known
        for p, q in zip(models_parameters(mas), models_parameters(saved), strict=True):
            p.copy_(q)
    kept = mas.protected.state

    def load(path: Path) -> Any:
        mas.load(path)
        return mas._state.to_dict()

    def check(state: Any, content: bytes) -> None:
        assert_valid(state, dict(mas._named()))
        mas.save(folder / "again")
        assert_has(tensors_of((folder / "again").read_bytes()), tensors_of(content))
        mas.load(folder / "again")
        assert equal(mas._state.to_dict(), state), "saved and loaded again it is another"
        use(mas, data)

    return Loader(
        (folder / "saved").read_bytes(),
        load,
        lambda: (mas.protected.state is kept, mas._state.to_dict()),
        lambda: setattr(mas.protected, "state", kept),
        check,
    )


def move(model: nn.Module, seed: int) -> None:
    """What training would do, also with adapters, whose base stays."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def models_parameters(mas: Any) -> list[Tensor]:
    return list(mas.protected.index.model.parameters())


def use(mas: Any, data: Any) -> None:
    """What a state that was loaded is for. A refusal is fine: λ may be anything."""
    before = [p.detach().clone() for p in models_parameters(mas)]
    state = mas._state.to_dict()
    tensors = [t for group in checkpoint.TENSORS for t in state[group].values()]
    try:
        values = [mas.penalty()]
        if mas.budget is not None:
            values.append(torch.tensor(mas.drift_measured()))
        mas.update_importance([data])
        mas.consolidate()
        is_huge = any(bool((t.abs() > 1e12).any()) for t in tensors)  # 0 times Inf is NaN
        assert is_huge or not any(v.isnan() for v in values), "the penalty, or the drift"
    except ValueError as error:
        if type(error) is not ValueError:
            raise TypeError("an error that the documentation does not name") from error
    except RuntimeError:  # there are no references any more, or the model does not take them
        if mas.budget is None:
            raise
    finally:
        with torch.no_grad():
            for p, value in zip(models_parameters(mas), before, strict=True):
                p.copy_(value)


def of_a_measurement(folder: Path) -> Loader:
    """``checkpoint=`` of a measurement that was stopped."""

    class Stop(Exception):
        pass

    def stopping(done: int) -> None:
        if done >= 7:
            raise Stop

    def fresh() -> MAS:
        return used(lambda: MAS(mlp(torch.float32)), tasks=1)

    mas = fresh()
    try:
        options = {"save_every": 2, "checkpoint": folder / "saved", "progress": stopping}
        mas.update_importance(X.split(1), **options)
    except Stop:
        pass
    content = (folder / "saved").read_bytes()
    mas = fresh()
    kept, random = mas.protected.state, torch.get_rng_state()
    values = dict(vars(kept))

    def load(path: Path) -> Any:
        before = path.read_bytes()
        try:
            mas.update_importance(X.split(1), checkpoint=path, save_every=2)
        except BaseException:
            assert path.read_bytes() == before, "the file was changed"
            raise
        return mas._state.to_dict()

    def check(state: Any, content: bytes) -> None:
        assert_valid(state, dict(mas._named()))

    return Loader(
        content,
        load,
        lambda: (mas._state.to_dict(), torch.equal(torch.get_rng_state(), random)),
        lambda: vars(kept).update(values),
        check,
    )


def merging_sources(folder: Path) -> tuple[list[Any], list[Path]]:
    """Two models, and what EWC saved of them."""
    models, states = [], []
    for i in range(2):
        model = convnet(torch.float32)
        move(model, i)
        ewc = EWC(model, state_dtype=("float32", "uint8")[i])
        ewc.consolidate([images(dtype=torch.float32)])
        ewc.save(folder / f"state{i}")
        states.append(folder / f"state{i}")
        models.append(model.state_dict())
    return models, states


def of_merging(folder: Path, content: bytes, paths: Callable[[Path], Any], **how: Any) -> Loader:
    """``merge``; ``paths``: its models and states, one of which is the file with faults."""
    out = folder / "out"

    def load(path: Path) -> Any:
        merge(*paths(path), out=out)
        return tensors_of(out.read_bytes())

    def reset() -> None:
        out.unlink()

    errors = (ValueError, FileNotFoundError, TypeError)
    return Loader(content, load, out.exists, reset, how.pop("check"), errors, **how)


def of_a_model(folder: Path) -> Loader:
    models, states = merging_sources(folder)
    safetensors.torch.save_file(models[0], folder / "a")
    safetensors.torch.save_file(models[1], folder / "b", {"format": "pt"})

    def check(found: Any, content: bytes) -> None:
        given = merge([models[0], tensors_of(content)], states)
        assert equal(found, given), "another model than the tensors make"

    content = (folder / "b").read_bytes()
    return of_merging(
        folder,
        content,
        lambda path: ([folder / "a", path], states),
        check=check,
        has_checksum=False,
    )


def of_a_state_of_a_model(folder: Path) -> Loader:
    models, states = merging_sources(folder)
    safetensors.torch.save_file(models[0], folder / "a")
    safetensors.torch.save_file(models[1], folder / "b")

    def check(found: Any, content: bytes) -> None:
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
        for name, tensor in found.items():
            if tensor.is_floating_point():  # between the two, up to rounding
                both = torch.stack([models[0][name], models[1][name]])
                assert torch.equal(tensor.clamp(both.amin(0) - 1e-5, both.amax(0) + 1e-5), tensor)

    def paths(path: Path) -> Any:
        return [folder / "a", folder / "b"], [states[0], path]

    return of_merging(folder, states[1].read_bytes(), paths, check=check)


def of_an_index(folder: Path) -> Loader:
    """The index of a model in two files."""
    models, states = merging_sources(folder)
    safetensors.torch.save_file(models[0], folder / "a")
    many, listed = folder / "many", {}
    many.mkdir()
    for i in range(2):
        part = {name: t for k, (name, t) in enumerate(models[1].items()) if k % 2 == i}
        safetensors.torch.save_file(part, many / f"model-{i}.safetensors")
        listed |= dict.fromkeys(part, f"model-{i}.safetensors")
    index = {"metadata": {"total_size": 1000}, "weight_map": listed}
    expected = merge([models[0], models[1]], states)

    def paths(path: Path) -> Any:
        path.replace(many / "model.safetensors.index.json")
        return [folder / "a", many], states

    def check(found: Any, content: bytes) -> None:
        assert equal(found, expected), "another model than the files have"

    content = json.dumps(index).encode()
    return of_merging(folder, content, paths, check=check, mutated=mutated_json, has_checksum=False)


def of_one_of_many(folder: Path) -> Loader:
    """One of the files of a model in two."""
    index = of_an_index(folder)
    models, states = merging_sources(folder)
    many = folder / "many"
    (many / "model.safetensors.index.json").write_bytes(index.content)
    content = (many / "model-1.safetensors").read_bytes()
    others = tensors_of((many / "model-0.safetensors").read_bytes())

    def paths(path: Path) -> Any:
        path.replace(many / "model-1.safetensors")
        return [folder / "a", many], states

    def check(found: Any, content: bytes) -> None:
        given = merge([models[0], {**others, **tensors_of(content)}], states)
        assert equal(found, given), "another model than the tensors make"

    return of_merging(folder, content, paths, check=check, has_checksum=False)


def channels_last() -> nn.Module:
    return convnet(torch.float32).to(memory_format=torch.channels_last)


def with_a_budget() -> MAS:
    budget = DriftBudget(0.05, samples=4)
    return MAS(mlp(torch.float32), budget=budget, state_dtype="uint8")


def with_adapters() -> MAS:
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return MAS(model, 2.0, adapters="merged", state_dtype="bfloat16")


AUTO = {"lambda_reg": {"2.*": "auto", "*": 3}, "drift": {"2.*": 0.2}}
IMAGES = images(dtype=torch.float32)
LOADERS: dict[str, Callable[[Path], Loader]] = {
    "float32": lambda folder: of_a_state(
        folder, lambda: MAS(mlp(torch.float32), 3.0, merge=("ema", 0.25))
    ),
    "bfloat16": lambda folder: of_a_state(
        folder,
        lambda: MAS(mlp(torch.bfloat16), merge="sum_of_sums", state_dtype="bfloat16", **AUTO),
        X.bfloat16(),
    ),
    "uint8": lambda folder: of_a_state(
        folder, lambda: MAS(channels_last(), 2.0, state_dtype="uint8"), IMAGES
    ),
    "float64": lambda folder: of_a_state(
        folder, lambda: MAS(mlp(), merge=("decay", 0.5)), X.double(), is_open=False
    ),
    "ewc": lambda folder: of_a_state(folder, lambda: EWC(mlp(torch.float32), floor=0.01)),
    "l2sp": lambda folder: of_a_state(folder, lambda: L2SP(mlp(torch.float32)), is_open=False),
    "budget": lambda folder: of_a_state(folder, with_a_budget),
    "adapters": lambda folder: of_a_state(folder, with_adapters),
    "large": lambda folder: of_a_state(
        folder, lambda: MAS(nn.Linear(256, 512)), torch.ones(4, 256)
    ),
    "measurement": of_a_measurement,
    "model": of_a_model,
    "state to merge": of_a_state_of_a_model,
    "index": of_an_index,
    "one of many": of_one_of_many,
}


# -- What must hold --------------------------------------------------------------------------------
def equal(a: Any, b: Any) -> bool:
    """To the bit, of nested mappings and lists."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and torch.equal(_bits(a), _bits(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or a != a)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_valid(state: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
    """Finite numbers, importance that is not negative, and the shapes of the model."""
    for group in checkpoint.TENSORS:
        for name, tensor in state[group].items():
            if tensor.is_floating_point() and "inputs" not in name:
                assert torch.isfinite(tensor).all(), f"{group}/{name} is not finite"
            if group in checkpoint.GROUPS:
                assert tensor.shape == named[name].shape, f"{group}/{name} has another shape"
            if group not in ("anchor", "references", "adapters"):
                assert (tensor >= 0).all(), f"{group}/{name} is negative"
    settings = {key: value for key, value in state.items() if key not in checkpoint.TENSORS}
    for value in _leaves(settings):
        if isinstance(value, (int, float)):
            assert math.isfinite(value), f"a setting is {value}"
            assert abs(value) < 2**63 or isinstance(value, float), f"a setting is {value}"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def assert_has(loaded: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """What was loaded, and saved again, is what the file had."""
    for name, tensor in loaded.items():
        group = name.split("/")[0]
        if name not in given or group in checkpoint.SCALES.values():
            continue
        if group in checkpoint.SCALES and tensor.dtype != given[name].dtype:
            continue  # it was quantized, or codes were not what is kept here
        if group in checkpoint.SCALES and tensor.dtype == torch.uint8:
            continue  # codes depend on their scales and strides
        assert equal(tensor, given[name].to(tensor.dtype)), f"{name} is not that of the file"


# -- One file --------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """What a file has led to.

    Attributes:
        case: the loader and the number.
        faults: the names of its faults.
        result: ``"the same"``, ``"changed and valid"`` or the place of the error that refused it.
        failure: what is wrong with that; empty if nothing is.
        seconds, memory: that loading took; bytes.
        size: bytes of the file.
    """

    case: str
    faults: str = ""
    result: str = ""
    failure: str = ""
    seconds: float = 0.0
    memory: int = 0
    size: int = 0


def run(name: str, number: int, loader: Loader, folder: Path, expected: Any) -> Outcome:
    """Makes a file and loads it."""
    content, faults, noticed = loader.mutated(loader.content, Random(f"{name}:{number}"))
    how = "" if noticed or not loader.has_checksum else ", and the checksum recomputed"
    outcome = Outcome(f"{name}:{number}", faults + how, size=len(content))
    path, before, loaded, caught = folder / "file", loader.remembered(), None, None
    path.write_bytes(content)
    resident, begun = _reset_peak(), time.process_time()
    try:
        loaded = loader.load(path)
    except Exception as error:
        caught = error
    outcome.seconds = time.process_time() - begun
    outcome.memory = max(0, _status("VmHWM") - resident)
    try:
        if caught is not None:
            outcome.result = _refused(caught)
            _check_error(caught, loader)
            assert equal(loader.remembered(), before), "the error has changed something"
        elif equal(loaded, expected):
            outcome.result = "the same"
        else:
            outcome.result = "changed and valid"
            assert not (noticed and loader.has_checksum), "the checksum should have told"
            loader.check(loaded, content)
        _check_costs(outcome)
    except Exception as wrong:
        where = f"\n{''.join(traceback.format_exception(caught))}" if caught else ""
        at = "".join(traceback.format_exception(wrong)[-3:])
        outcome.failure = f"{type(wrong).__name__}: {wrong}{where or at}"
    if caught is None:
        loader.reset()
    return outcome


def _refused(error: BaseException) -> str:
    """An error's type and the place in the package that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/mas_ext/" in f.filename]
    place = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "elsewhere"
    return f"{type(error).__name__} in {place}"


def _check_error(error: BaseException, loader: Loader) -> None:
    assert type(error) in loader.errors, "an error that the documentation does not name"
    assert len(str(error)) > 20, "an error that says nothing"
    chain: BaseException | None = error
    while chain is not None:
        is_memory = isinstance(chain, MemoryError) or "allocate memory" in str(chain)
        assert not is_memory, "it has asked for too much memory"
        chain = chain.__cause__ or chain.__context__


def _check_costs(outcome: Outcome) -> None:
    assert outcome.seconds < SECONDS, f"it took {outcome.seconds:.1f} s"
    allowed = ROOM + MULTIPLE * outcome.size
    assert outcome.memory < allowed, f"it took {outcome.memory / 2**20:.0f} MiB"


def _status(key: str) -> int:
    """A line of Linux's account of this process, in bytes; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def _reset_peak() -> int:
    """Lets Linux measure the peak of the memory anew; returns what there is."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmHWM")
    return _status("VmRSS")


# -- The process that loads them -------------------------------------------------------------------
Job = tuple[str, int, int]  # a loader, and its first number and that after the last


def work(jobs: list[Job]) -> None:
    """Loads files, and prints what each has led to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ready = [(*job, *_ready(job[0], Path(tempfile.mkdtemp(dir=Path.cwd())))) for job in jobs]
    _limit_memory()
    for name, first, last, loader, folder, expected in ready:
        for number in range(first, last):
            print(json.dumps({"begun": [name, number]}), flush=True)
            faulthandler.dump_traceback_later(HUNG, exit=True)
            outcome = run(name, number, loader, folder, expected)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(asdict(outcome)), flush=True)


def _ready(name: str, folder: Path) -> tuple[Loader, Path, Any]:
    """A loader, its folder, and what an intact file gives."""
    loader, path = LOADERS[name](folder), folder / "file"
    path.write_bytes(loader.content)
    expected = loader.load(path)
    loader.reset()
    return loader, folder, expected


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    most = _status("VmSize") + LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def outcomes(jobs: list[Job]) -> Iterator[Outcome]:
    """Of all files. After a crash another process goes on."""
    while jobs:
        with tempfile.TemporaryDirectory() as folder:
            begun: tuple[str, int] | None = None
            process = _process(jobs, Path(folder))
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if "begun" in found:
                    begun = found["begun"]
                else:
                    yield Outcome(**found)
            if process.wait() == 0:
                return
            said = Path(folder, "errors").read_text(errors="replace")[-3000:]
        assert begun is not None, said
        failure = f"the process ended with {process.returncode}\n{said}"
        yield Outcome(f"{begun[0]}:{begun[1]}", result="a crash", failure=failure)
        jobs = _left(jobs, *begun)


def _process(jobs: list[Job], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--work", json.dumps(jobs)]
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with open(folder / "errors", "wb") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )


def _left(jobs: list[Job], name: str, number: int) -> list[Job]:
    """The jobs after one file."""
    position = next(k for k, job in enumerate(jobs) if job[0] == name)
    rest = (name, number + 1, jobs[position][2])
    return [rest, *jobs[position + 1 :]]


# -- All of them -----------------------------------------------------------------------------------
@dataclass
class Report:
    """What all files have led to."""

    results: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Outcome] = field(default_factory=list)
    slowest: Outcome = field(default_factory=lambda: Outcome(""))
    largest: Outcome = field(default_factory=lambda: Outcome(""))

    def add(self, outcome: Outcome) -> None:
        name = outcome.case.rpartition(":")[0]
        self.results.setdefault(name, Counter())[outcome.result] += 1
        if outcome.failure:
            self.failures.append(outcome)
        self.slowest = max(self.slowest, outcome, key=lambda one: one.seconds)
        self.largest = max(self.largest, outcome, key=lambda one: one.memory)

    def __str__(self) -> str:
        lines = []
        for failure in self.failures:
            lines.append(f"{failure.case} ({failure.faults}): {failure.failure}\n")
        for name, results in self.results.items():
            lines.append(f"{name}: {results.total()} files")
            lines += [f"  {count:6}  {result}" for result, count in results.most_common()]
        lines.append(
            f"{sum(results.total() for results in self.results.values())} files, "
            f"{len(self.failures)} failures; the slowest took {self.slowest.seconds:.2f} s "
            f"({self.slowest.case}), and the most memory was {self.largest.memory / 2**20:.1f} MiB "
            f"for a file of {self.largest.size / 2**20:.2f} MiB ({self.largest.case})"
        )
        return "\n".join(lines)


def report_of(jobs: list[Job], *, shows_progress: bool = False) -> Report:
    """Loads the files of these jobs."""
    report = Report()
    for done, outcome in enumerate(outcomes(jobs), 1):
        report.add(outcome)
        if shows_progress and done % 500 == 0:
            print(f"{done} files, {len(report.failures)} failures", file=sys.stderr, flush=True)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT, help=f"of files (default: {COUNT:,})")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--only", metavar="LOADER:NUMBER", help="one file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        work(json.loads(arguments.work))
        return 0
    each = -(-arguments.count // len(arguments.loaders))
    jobs = [(name, 0, each) for name in arguments.loaders]
    if arguments.only:
        name, _, number = arguments.only.rpartition(":")
        jobs = [(name, int(number), int(number) + 1)]
    report = report_of(jobs, shows_progress=True)
    print(report)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
