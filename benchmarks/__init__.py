"""Side-by-side measurements of MAS on the CPU: ``python -m benchmarks --help``."""
