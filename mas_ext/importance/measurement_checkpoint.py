"""What a measurement has added up so far, in a file: killed, it goes on where it was.

The sums of a measurement depend on nothing but the batches before, so sums, counts and random
numbers are all there is to keep. The file is written between two batches, never after the last, so
that a measurement which is taken up always has something left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import local
from mas_ext._distributed.topology import is_running
from mas_ext._storage import atomic_write, tensor_file
from mas_ext.importance.estimation import SampleStatistics, check_finite
from mas_ext.importance.options import Measurement

_FORMAT = "mas_ext measurement"
_VERSION = 2  # with the energy
_END = object()

Path_ = str | os.PathLike[str]
Tensors = Mapping[str, Tensor]


class MeasurementCheckpoint:
    """Of a measurement that is not kept.

    Attributes:
        seen: what has been measured.
        batches_before: how many batches were measured before and will be passed over.
    """

    def __init__(self) -> None:
        self.statistics = SampleStatistics()
        self.batches_before = 0

    def open(self, params: Tensors) -> None:
        """Looks for what was kept before; ``params`` is θ, of which it has to be."""

    def reset(self) -> None:
        """Forgets what was kept before: others that go the same way have kept another part of it.

        Ranks that hold one model together go through the same batches, and write one after another.
        """

    def restore(self, sums: Tensors) -> None:
        """Puts into ``sums`` what was measured before, if anything."""

    def batches(self, data: Iterable[Any]) -> Iterable[Any]:
        """Those that are still to be measured."""
        return data

    def count(self, more: SampleStatistics) -> None:
        """After every batch, once all of it is in the sums."""
        self.statistics += more

    def refuse(self, what: str) -> None:
        """Raises a ValueError if it is kept: ``what`` cannot be taken up in the middle."""

    def remove(self) -> None:
        """After the measurement: there is nothing to take up any more."""


class FileCheckpoint(MeasurementCheckpoint):
    """Of one that is kept in a file.

    Args:
        path: where; each process of several has its own, with its rank in the name.
        save_every: after how many samples, or a few more, it is written again.
        about: what tells this measurement from others, of what JSON can say; ``tasks`` and
            ``samples before`` are what is in the state that it adds to.

    Raises:
        TypeError, ValueError: ``path`` or ``save_every`` cannot be used.
    """

    def __init__(self, path: Path_, save_every: int, about: Mapping[str, Any]) -> None:
        super().__init__()
        if isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1:
            raise ValueError(f"save_every is {save_every!r}; pass a positive number of samples")
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint is {path!r}; pass the path of a file, or None")
        self._path, self._about = _own(path, about)
        self._every = save_every
        self._before: dict[str, Tensor] = {}  # what was read
        self._began: dict[str, Tensor] = {}  # random numbers before the first batch
        self._batches = 0
        self._kept = 0  # samples, when it was last written

    def open(self, params: Tensors) -> None:
        """Reads the file, if there is one.

        Raises:
            ValueError: it is corrupted, or of another measurement.
        """
        self._devices = {p.device for p in params.values() if p.device.type == "cuda"}
        self._about["parameters"] = _fingerprint(params)
        if not self._path.exists():
            return
        try:
            settings, self._before = tensor_file.read(self._path, self._check_settings)
        except _Ended:  # of several ranks that ended one was killed before it removed its file
            return
        self.batches_before = settings["batches"]
        self.statistics = SampleStatistics(
            settings["samples"], settings["weight"], settings["energy"]
        )

    def reset(self) -> None:
        """The file stays until it is written again."""
        self._before = {}
        self.batches_before, self.statistics = 0, SampleStatistics()

    def restore(self, sums: Tensors) -> None:
        """From what was read."""
        self._sums = sums
        self._batches, self._kept = self.batches_before, self.statistics.samples
        for name, value in tensor_file.under("sums", self._before).items():
            sums[name].copy_(value)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Passes over those that were measured before, and writes the file when it is due.

        Raises:
            ValueError: the data has no more batches than were measured before.
        """
        # What is shuffled is so as before.
        _set_random_states(tensor_file.under("began", self._before))
        self._began = _random_states(self._devices)
        iterator = iter(data)
        batch: Any = self._passed(iterator)
        while batch is not _END:
            if self.statistics.samples - self._kept >= self._every:
                self._write()
            yield batch
            self._batches += 1
            batch = next(iterator, _END)

    def refuse(self, what: str) -> None:
        """It goes through the data sample by sample, all ranks at once."""
        raise ValueError(
            f"checkpoint: a measurement with {what} cannot be taken up in the middle; leave "
            "checkpoint out, and call update_importance() and save() for a part of the data at a "
            "time"
        )

    def remove(self) -> None:
        """The file, and what killed processes left of it."""
        atomic_write.remove(self._path)

    def _passed(self, iterator: Iterator[Any]) -> Any:
        """The first batch that was not measured before."""
        batch = next(iterator, _END)
        for k in range(self.batches_before):
            batch = next(iterator, _END)
            if batch is _END:
                raise ValueError(self._too_few(k + 1))
        _set_random_states(tensor_file.under("left", self._before))
        self._before = {}
        return batch

    def _too_few(self, batches: int) -> str:
        return (
            f"data: it has at most {batches} batches, and {self.batches_before} were measured "
            f"before this run took them up from {str(self._path)!r}, with more to come; pass the "
            "same batches in the same order, or delete the file to begin anew"
        )

    def _write(self) -> None:
        check_finite(self._sums)
        left = _random_states(self._devices)
        groups = {"sums": self._sums, "began": self._began, "left": left}
        settings = {
            "format": _FORMAT,
            "version": _VERSION,
            "about": self._about,
            "batches": self._batches,
            **asdict(self.statistics),
        }
        tensors = {f"{group}/{n}": t for group, values in groups.items() for n, t in values.items()}
        tensor_file.write(self._path, settings, tensors)
        self._kept = self.statistics.samples

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        source = f"checkpoint: {str(self._path)!r}"
        if settings.get("format") != _FORMAT or settings.get("version") != _VERSION:
            raise ValueError(
                f"{source} is no measurement that this mas_ext began; name another file (what "
                "save() made is another kind)"
            )
        before = settings["about"]
        if _age(before) < _age(self._about):
            raise _Ended
        for key, now in self._about.items():
            if before.get(key) != now:
                raise ValueError(
                    f"{source} is of another measurement: its {key} is {before.get(key)!r}, here "
                    f"it is {now!r}. Finish that one, or delete the file to begin anew"
                )


def make_checkpoint(
    measurement: Measurement, tasks: int, samples_before: Mapping[str, int]
) -> MeasurementCheckpoint:
    """The checkpoint that the options ask for.

    Args:
        tasks: the number of tasks in the state that the measurement adds to.
        samples_before: for each parameter, the number of samples already in its sums.

    Raises:
        TypeError, ValueError: ``checkpoint`` or ``save_every`` cannot be used.
    """
    if measurement.checkpoint is None:
        return MeasurementCheckpoint()
    described = {"tasks": tasks, "samples before": samples_before, **measurement.described()}
    return FileCheckpoint(measurement.checkpoint, measurement.save_every, described)


class _Ended(Exception):
    """A measurement that is part of the state already."""


def _age(about: Mapping[str, Any]) -> tuple[int, int]:
    """Grows with every measurement that ends."""
    return about["tasks"], sum(about["samples before"].values())


def _own(path: Path_, about: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file of this process, and what there is to say about it."""
    said = json.loads(json.dumps(about))  # as it will be read
    if not is_running():
        return Path(path), {**said, "processes": 1}
    own = f"{os.fspath(path)}.rank{torch.distributed.get_rank()}"
    return Path(own), {**said, "processes": torch.distributed.get_world_size()}


def _random_states(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """Of PyTorch's generators, by device."""
    cuda = {str(device): torch.cuda.get_rng_state(device) for device in devices}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_states(states: Tensors) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(params: Tensors) -> str:
    """Tells θ from another: names, shapes, and sums of bits, the same in whatever order."""
    digest = hashlib.sha256()
    for name, p in params.items():
        bits = local(p).detach().contiguous().view(_INTEGERS[p.dtype.itemsize])
        digest.update(f"{name} {list(bits.shape)} {p.dtype} {int(bits.sum())}\n".encode())
    return digest.hexdigest()[:16]
