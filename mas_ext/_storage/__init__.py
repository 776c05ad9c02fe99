"""Tensors in flat buffers, and tensors in files that are replaced atomically."""
