"""What the compiler made of the CUDA kernels, read from the built library without a GPU.

``python -m tests.hardware.sass [LIBRARY]`` fails where ``expectations.py`` is not met: which
kernels there are, registers and the threads they leave room for, spills to local memory, and the
width of the accesses in hot loops.
"""
