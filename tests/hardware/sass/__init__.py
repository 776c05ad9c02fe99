"""What the compiler made of the CUDA kernels, read from the built library.

No machine here has a GPU, so what can be known of a kernel without one is held to instead: which
architectures are there, how many registers a thread takes and how many threads that leaves room
for, whether anything went to local memory, and how wide the accesses in its hot loop are.

    python -m tests.hardware.sass [LIBRARY] [--markdown FILE]

prints the table and fails where `expectations.py`, which says what must hold, is not met.
"""
