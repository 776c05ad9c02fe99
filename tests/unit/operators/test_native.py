"""What was built, what runs, and what happens where nothing was built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mas_ext
from mas_ext._operators import native
from tests.support.operators import OPERATORS

ACCUMULATE = "import mas_ext, torch; o = [torch.zeros(3)]; " + (
    "mas_ext.functional.accumulate_importance_(o, [torch.full((3,), -2.0)], 0.5); "
    "assert o[0].tolist() == [1, 1, 1]; "
)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )


def test_build_info():
    info = mas_ext.build_info()
    assert info["torch"] == torch.__version__
    disabled = os.environ.get("MAS_EXT_DISABLE_NATIVE") == "1"
    assert info["native"] is not disabled
    assert info["reason"] == ("MAS_EXT_DISABLE_NATIVE=1" if disabled else None)
    if not disabled:
        assert info["simd"] in ("avx512f", "avx2", "sse2", "neon", "baseline")
        assert info["compiler"]


def test_which_kernels_are_registered():
    """Those for CUDA also where torch is for the CPU, which never calls them."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    info = mas_ext.build_info()
    for name in {row.function for row in OPERATORS.values()}:
        assert has_kernel(f"mas_ext::{name}", "CPU") is info["native"]
        assert has_kernel(f"mas_ext::{name}", "CUDA") is info["cuda_kernels"]


def test_every_operator_is_in_the_record():
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mas_ext::")}
    assert names == {f"mas_ext::{row.function}" for row in OPERATORS.values()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_asking_for_cuda_without_a_gpu_is_torchs_error_and_breaks_nothing():
    code = (
        "import mas_ext, torch\n"
        "f = mas_ext.functional\n"
        "def ask():\n"
        "    x = torch.ones(3, device='cuda')\n"
        "    f.penalty([x], [x], [x], 1.0)\n"
        "for _ in range(2):\n"
        "    try: ask()\n"
        "    except (RuntimeError, AssertionError) as error: assert 'mas_ext' not in str(error)\n"
        "    else: raise SystemExit('no error')\n"
        "    x, zero = torch.full((3,), 2.0), torch.zeros(3)\n"
        "    assert f.penalty([x], [zero], [torch.ones(3)], 1.0) == 6.0\n"
        "print('works')"
    )
    assert run(code).stdout == "works\n"


def test_what_has_run_where_is_stated():
    verified = mas_ext.build_info()["verified"]
    assert set(verified) == {"cpu", "cuda"}
    verified["cuda"] = "changed"
    assert mas_ext.build_info()["verified"]["cuda"] == native._VERIFIED["cuda"]


def test_disabling_native_is_silent_and_works():
    code = ACCUMULATE + "i = mas_ext.build_info(); assert not i['native'] and i['reason']"
    assert "mas_ext runs in plain" not in run(code, MAS_EXT_DISABLE_NATIVE="1").stderr


def test_missing_kernels_warn_once_and_say_what_to_do():
    pretend = (
        "import warnings, pathlib; glob = pathlib.Path.glob; "
        "pathlib.Path.glob = lambda s, p: [] if '_kernels' in p else glob(s, p); "
    )
    text = run(pretend + ACCUMULATE, MAS_EXT_DISABLE_NATIVE="0").stderr
    assert text.count("mas_ext runs in plain PyTorch") == 1
    assert "the kernels were not built" in text
    is_a_clone = (Path(mas_ext.__file__).parents[1] / "setup.py").is_file()
    assert ("run Python elsewhere" in text) == is_a_clone
    assert "--no-build-isolation" in text


@pytest.mark.parametrize("version", ["2.7.0", "2.12.1+cu126"])
def test_an_old_torch_is_named(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setenv("MAS_EXT_DISABLE_NATIVE", "0")
    monkeypatch.setattr(native, "_library", lambda: __import__("pathlib").Path("kernels.so"))
    with pytest.warns(UserWarning, match=rf"need torch>=2.13 and this is torch {version[:3]}"):
        assert "torch>=2.13" in native.load()


def test_a_library_that_does_not_load_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "_kernels.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(torch, "__version__", "2.13.0")  # of an older one no library is loaded
    monkeypatch.setenv("MAS_EXT_DISABLE_NATIVE", "0")
    monkeypatch.setattr(native, "_library", lambda: broken)
    with pytest.warns(UserWarning, match="the kernels do not load"):
        assert "do not load" in native.load()
