"""Builds the kernels: `pip install --no-build-isolation .`, with the torch they will run under.

MAS_EXT_CUDA=auto|0|1  CUDA kernels for the GPUs of this machine, if it has any (auto, the default);
                       never (0); or fail without a CUDA toolkit and a CUDA torch (1), for all
                       architectures if there is no GPU. FORCE_CUDA=1 means the same as 1.
MAS_EXT_NATIVE=1       fail when the native build fails, instead of leaving the PyTorch fallback.
MAS_EXT_WERROR=1       treat compiler warnings as errors.
TORCH_CUDA_ARCH_LIST   the architectures to compile for, with or without a GPU.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup

MINIMUM_TORCH = (2, 13)
SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
CUDA_ARCHS = "8.0;9.0;10.0;12.0+PTX"
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-trapping-math", "-fno-math-errno"]
WERROR = os.getenv("MAS_EXT_WERROR") == "1"
WARNINGS = ["-Wall", "-Wextra", *(["-Werror"] if WERROR else [])]
# That covers ptxas, which is asked to warn of registers that do not suffice.
PTXAS_WARNINGS = "-Xptxas=-warn-spills,-warn-lmem-usage"
NVCC_WARNINGS = ["-Werror=all-warnings", PTXAS_WARNINGS] if WERROR else []


def say(message):
    print(f"mas_ext: {message}", flush=True)


def torch_or_reason():
    """The torch to build against, or why there is none."""
    try:
        import torch
    except ImportError:
        return None, "torch cannot be imported here (install with --no-build-isolation)"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        return (
            None,
            f"torch {torch.__version__} is older than {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}",
        )
    return torch, None


def cuda_home():
    """The toolkit that the nvcc in use really belongs to: an nvcc on the PATH may be a wrapper."""
    nvcc = shutil.which("nvcc", path=os.path.join(os.getenv("CUDA_HOME", ""), "bin"))
    nvcc = nvcc or shutil.which("nvcc")
    if nvcc is None:
        return None
    dryrun = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.*)$", dryrun.stderr, re.MULTILINE)
    return Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def cuda_choice():
    choice = "1" if os.getenv("FORCE_CUDA") == "1" else os.getenv("MAS_EXT_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"mas_ext: MAS_EXT_CUDA={choice!r}; use auto, 0 or 1")
    return choice


def architectures(torch):
    """What to compile for: as asked for, or this machine's GPUs, or all; None for nothing."""
    if asked := os.getenv("TORCH_CUDA_ARCH_LIST"):
        return asked
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    return CUDA_ARCHS if cuda_choice() == "1" else None


def decide_cuda(torch):
    """The toolkit to build CUDA kernels with, or None; says what was decided and why."""
    choice, home, archs = cuda_choice(), cuda_home(), architectures(torch)
    if choice == "0":
        reason = "MAS_EXT_CUDA=0"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif archs is None:
        reason = "this machine has no GPU (MAS_EXT_CUDA=1 compiles them all the same)"
    elif home is None:
        reason = "no nvcc was found (set CUDA_HOME)"
    else:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
        say(f"CUDA kernels: yes, with {home}, for {archs}")
        return home
    if choice == "1":
        raise SystemExit(f"mas_ext: CUDA kernels were asked for, but {reason}")
    say(f"CUDA kernels: no, {reason}")
    return None


def kernels(torch, home):
    """mas_ext/_kernels: operators on the LibTorch stable ABI, no dependence on Python's version."""
    os.environ["CUDA_HOME"] = str(home or "")
    from torch.utils import cpp_extension

    folders = ["cpu", "cuda"] if home else ["cpu"]
    sources = sorted(str(p) for f in folders for p in Path("csrc", f).glob(f"*{SUFFIX[f]}"))
    target = f"-DTORCH_TARGET_VERSION=0x{MINIMUM_TORCH[0]:02x}{MINIMUM_TORCH[1]:02x}000000000000"
    headers = cpp_extension.include_paths()
    nvcc = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", *NVCC_WARNINGS]
    # The CUDA runtime is linked statically and libtorch_cuda not at all: one file then serves
    # CUDA and CPU builds of torch.
    runtime = [f"{home}/lib64/libcudart_static.a", "-ldl", "-lrt", "-lpthread"] if home else []
    return Extension(
        "mas_ext._kernels",
        sources,
        depends=sorted(str(p) for p in Path("csrc").rglob("*.*h")),
        include_dirs=[str(home / "include")] if home else [],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *WARNINGS, target, *(f"-isystem{path}" for path in headers)],
            "nvcc": [*nvcc, target, *(f"-isystem={path}" for path in headers)],
        },
        extra_link_args=runtime,
        py_limited_api=True,
    )


def pybind11_headers():
    """Of the pybind11 that is installed, or else of the one that torch carries."""
    try:
        import pybind11
    except ImportError:
        from torch.utils import cpp_extension

        return cpp_extension.include_paths()[0]
    return pybind11.get_include()


def build_information(torch, home):
    """mas_ext._C: the build's configuration, and lists of tensors for the kernels."""
    archs = os.environ["TORCH_CUDA_ARCH_LIST"] if home else ""
    values = {
        "MAS_EXT_TORCH_VERSION": torch.__version__,
        "MAS_EXT_MINIMUM_TORCH": ".".join(map(str, MINIMUM_TORCH)),
        "MAS_EXT_CUDA_ARCHS": archs,
    }
    from torch.utils import cpp_extension

    headers = [pybind11_headers(), *cpp_extension.include_paths()]
    flags = [*CXX_FLAGS, *WARNINGS, *(f"-isystem{path}" for path in headers)]
    return Extension(
        "mas_ext._C",
        ["csrc/module.cpp"],
        define_macros=list(values.items()),
        extra_compile_args={"cxx": flags},
    )


def drop_cuda(extensions):
    """Makes CPU kernels of what were to be CPU and CUDA kernels."""
    for extension in extensions:
        extension.sources = [s for s in extension.sources if not s.endswith(".cu")]
        extension.extra_link_args = []
        extension.define_macros = [
            (name, "" if name == "MAS_EXT_CUDA_ARCHS" else value)
            for name, value in extension.define_macros
        ]


def forgiving(base, may_drop_cuda):
    """A build that fails tries without CUDA, and then leaves the pure-PyTorch fallback."""

    class ForgivingBuild(base):
        def run(self):
            try:
                self.run_with_or_without_cuda()
            except Exception as error:
                if os.getenv("MAS_EXT_NATIVE") == "1":
                    raise
                self.extensions = []
                say(f"THE KERNELS WERE NOT BUILT ({error}); mas_ext will run in plain PyTorch")

        def run_with_or_without_cuda(self):
            try:
                super().run()
            except Exception as error:
                if not may_drop_cuda:
                    raise
                say(f"THE CUDA KERNELS WERE NOT BUILT ({error}); trying the CPU kernels alone")
                drop_cuda(self.extensions)
                self.compiler = None  # run() makes its own
                super().run()

        def get_outputs(self):
            return [path for path in super().get_outputs() if os.path.exists(path)]

    return ForgivingBuild


def native_arguments():
    torch, reason = torch_or_reason()
    if torch is None:
        if os.getenv("MAS_EXT_NATIVE") == "1":
            raise SystemExit(f"mas_ext: the kernels were asked for, but {reason}")
        say(f"kernels: no, {reason}; mas_ext will run in plain PyTorch")
        return {}
    home = decide_cuda(torch)
    extensions = [kernels(torch, home), build_information(torch, home)]
    from torch.utils.cpp_extension import BuildExtension

    build = forgiving(BuildExtension, may_drop_cuda=home is not None and cuda_choice() == "auto")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": build}}


setup(**native_arguments())
