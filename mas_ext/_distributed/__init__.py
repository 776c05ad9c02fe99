"""Everything that depends on torch.distributed.

``shards.py``: DTensors and their local parts. ``topology.py``: which processes take part in a
measurement. ``ranks.py``: what they exchange. ``fsdp.py``: models sharded by ``fully_shard``, and
how to unshard them for a measurement. ``gathering.py``: writing one file from many processes.
"""
