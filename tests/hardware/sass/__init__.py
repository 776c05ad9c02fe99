"""What the compiler made of the CUDA kernels, read from the built library.

    python -m tests.hardware.sass [LIBRARY]

verifies, without a GPU, what can be known of each kernel: the architectures it is compiled for, the
registers a thread takes and how many threads that leaves room for, whether anything is spilled to
local memory, and how wide the accesses in its hot loop are. Prints a table, and fails where
`expectations.py` is not met.
"""
