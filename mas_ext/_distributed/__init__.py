"""Everything that knows of torch.distributed.

``shards.py``: parameters that are DTensors, of which a process holds a part. ``ranks.py``: which
processes share the samples out, what they tell each other, and what they add up. ``fsdp.py``: what
``fully_shard`` does to a model, and its parameters made whole for a measurement.
"""
