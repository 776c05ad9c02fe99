"""What mas_ext's operators read and write, in bytes per parameter, and the least time it takes.

``python -m benchmarks.memory_traffic 7e9 --bandwidth 3350 --theta bfloat16 --omega uint8`` prints
the times for 7 billion parameters at 3350 GB/s: bytes per parameter × parameters / bandwidth.
"""

from __future__ import annotations

import argparse

from benchmarks.text import Table, duration
from mas_ext.precision import BLOCK

THETA = {"float32": 4.0, "bfloat16": 2.0}
OMEGA = {"float32": 4.0, "bfloat16": 2.0, "uint8": 1 + 4 / BLOCK}  # a float32 scale per block

# Operator → tensors that it reads, and tensors that it writes. θ, its gradient g, the anchors θ*
# and an optimizer's moments m, v have θ's dtype.
OPERATORS = {
    "accumulate_importance_": (("Ω", "g"), ("Ω",)),
    "penalty": (("θ", "θ*", "Ω"), ()),
    "add_penalty_grad_": (("g", "θ", "θ*", "Ω"), ("g",)),
    "proximal_step_": (("θ", "θ*", "Ω"), ("θ",)),
    "sgd_step_": (("θ", "g", "θ*", "Ω"), ("θ",)),
    "sgd_step_, momentum": (("θ", "g", "m", "θ*", "Ω"), ("θ", "m")),
    "adamw_step_": (("θ", "g", "m", "v", "θ*", "Ω"), ("θ", "m", "v")),
}
# While importance is measured, Ω is a float32 sum whatever the dtype it is stored in afterwards.
SUMS_IN_FLOAT32 = ("accumulate_importance_",)


def bytes_per_parameter(operator: str, theta: str = "float32", omega: str = "float32") -> float:
    """Read and written by one call, if nothing is in the cache."""
    omega = "float32" if operator in SUMS_IN_FLOAT32 else omega
    read, written = OPERATORS[operator]
    return sum(OMEGA[omega] if name == "Ω" else THETA[theta] for name in (*read, *written))


_COMBINATIONS = (("float32", "float32"), ("float32", "uint8"), ("bfloat16", "uint8"))


def table() -> Table:
    """Bytes per parameter of every operator, for the documentation."""
    kept = [f"{THETA[theta] + OMEGA[omega]:.2f}" for theta, omega in _COMBINATIONS]  # θ* and Ω
    rows = [
        [
            f"`{operator}`",
            ", ".join(OPERATORS[operator][0]),
            ", ".join(OPERATORS[operator][1]) or "–",
            *(f"{bytes_per_parameter(operator, *dtypes):.2f}" for dtypes in _COMBINATIONS),
        ]
        for operator in OPERATORS
    ]
    headings = (f"θ {theta}, Ω {omega}" for theta, omega in _COMBINATIONS)
    return Table(
        "Bytes per parameter.",
        ("", "reads", "writes", *headings),
        [*rows, ["kept in memory between steps", "", "", *kept]],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parameters", type=float, help="on one device")
    parser.add_argument("--bandwidth", type=float, required=True, help="of its memory, in GB/s")
    parser.add_argument("--theta", choices=THETA, default="float32")
    parser.add_argument("--omega", choices=OMEGA, default="float32")
    given = parser.parse_args()
    for operator in OPERATORS:
        moved = bytes_per_parameter(operator, given.theta, given.omega)
        time = duration(moved * given.parameters / (given.bandwidth * 1e9))
        print(f"{operator:24} {moved:6.2f} bytes per parameter  {time}")


if __name__ == "__main__":
    main()
