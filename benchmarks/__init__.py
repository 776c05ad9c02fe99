"""``python -m benchmarks``: times mas_ext and the alternatives to it on this machine."""
