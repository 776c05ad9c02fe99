"""Saves a measurement while it runs, so that it can be resumed after the process is killed.

The sums of a measurement depend only on the batches measured so far. It is therefore enough to save
the sums, the number of samples and batches, and the states of the random number generators. The
file is written between two batches and never after the last one, so a restored measurement always
has at least one batch left to measure.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_ext._distributed.shards import local
from mas_ext._distributed.topology import is_running
from mas_ext._storage import atomic_write, tensor_file
from mas_ext._storage.stored_numbers import are_finite, is_whole, restored
from mas_ext.importance.estimation import SampleStatistics, check_finite
from mas_ext.importance.options import Measurement

_FORMAT = "mas_ext measurement"
_VERSION = 2  # version 2 added the energy
_END = object()

Path_ = str | os.PathLike[str]
Tensors = Mapping[str, Tensor]


class MeasurementCheckpoint:
    """The checkpoint of a measurement that is not saved; base class of :class:`FileCheckpoint`.

    Attributes:
        statistics: the statistics of the samples measured so far, restored ones included.
        batches_before: the number of batches that a restored file covers; they are skipped.
    """

    def __init__(self) -> None:
        self.statistics = SampleStatistics()
        self.batches_before = 0

    def open(self, params: Tensors) -> None:
        """Reads the saved measurement, if there is one, and checks that it is of ``params``, θ."""

    def reset(self) -> None:
        """Discards the saved measurement, to start from the first batch.

        Ranks that share one model go through the same batches but write their files one after
        another. If they were killed in between, their files cover different numbers of batches.
        """

    def restore(self, sums: Tensors) -> None:
        """Copies the saved sums into ``sums``, if there are any."""

    def batches(self, data: Iterable[Any]) -> Iterable[Any]:
        """The batches that remain to be measured."""
        return data

    def count(self, more: SampleStatistics) -> None:
        """Adds a batch's statistics; called once the whole batch has been added to the sums."""
        self.statistics += more

    def refuse(self, what: str) -> None:
        """Raises ValueError if this measurement is saved, since ``what`` cannot be resumed."""

    def remove(self) -> None:
        """Deletes the saved measurement; called after the last batch."""


class FileCheckpoint(MeasurementCheckpoint):
    """The checkpoint of a measurement that is saved to a file.

    Args:
        path: the file. With several processes, each adds ``.rank<r>`` to the name.
        save_every: the number of samples after which the file is written again, at the next end of
            a batch.
        about: what identifies this measurement, as values that JSON can represent. Its items
            ``tasks`` and ``samples before`` describe the state that the measurement adds to.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: ``save_every`` is not a positive integer.
    """

    def __init__(self, path: Path_, save_every: int, about: Mapping[str, Any]) -> None:
        super().__init__()
        if isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 1:
            raise ValueError(f"save_every is {save_every!r}; pass a positive number of samples")
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoint is {path!r}; pass the path of a file, or None")
        self._path, self._about = _own(path, about)
        self._every = save_every
        self._before: dict[str, Tensor] = {}  # the tensors read from the file
        self._began: dict[str, Tensor] = {}  # random states before the first batch
        self._batches = 0
        self._kept = 0  # the number of samples when the file was last written

    def open(self, params: Tensors) -> None:
        """Reads the file, if there is one.

        Raises:
            ValueError: the file is corrupted, or belongs to another measurement.
        """
        self._devices = {p.device for p in params.values() if p.device.type == "cuda"}
        self._about["parameters"] = _fingerprint(params)
        if not self._path.exists():
            return
        try:
            settings, self._before = tensor_file.read(self._path, self._check_settings)
        except _Ended:  # this rank was killed after the measurement, before it removed its file
            return
        names = [field.name for field in fields(SampleStatistics)]
        counted = {name: settings[name] for name in names if name in settings}
        try:
            self.statistics = restored(SampleStatistics, counted, "the measurement")
            if not is_whole(settings.get("batches"), 1) or not self.statistics.samples:
                raise ValueError("the state is damaged: 'batches' or 'samples' is no number")
        except ValueError as error:
            raise ValueError(self._damaged(error)) from error
        self.batches_before = settings["batches"]

    def reset(self) -> None:
        """Starts from the first batch. The file stays until it is next written."""
        self._before = {}
        self.batches_before, self.statistics = 0, SampleStatistics()

    def restore(self, sums: Tensors) -> None:
        """Copies the sums that :meth:`open` read into ``sums``, which later writes will save."""
        self._sums = sums
        self._batches, self._kept = self.batches_before, self.statistics.samples
        if not self.batches_before:
            return
        before = tensor_file.under("sums", self._before)
        try:
            _check_sums(before, sums)
        except ValueError as error:
            raise ValueError(self._damaged(error)) from error
        for name, value in before.items():
            sums[name].copy_(value)

    def batches(self, data: Iterable[Any]) -> Iterator[Any]:
        """Skips the batches that were measured before, and writes the file whenever it is due.

        Raises:
            ValueError: the data does not have more batches than were measured before.
        """
        # With the random state of the first run, a shuffling loader draws the same order again.
        self._set_random_states("began")
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
        """Raises ValueError: ``what`` cannot be resumed in the middle."""
        raise ValueError(
            f"checkpoint: a measurement with {what} cannot be taken up in the middle; leave "
            "checkpoint out, and call update_importance() and save() for a part of the data at a "
            "time"
        )

    def remove(self) -> None:
        """Deletes the file, and temporary files that killed processes left behind."""
        atomic_write.remove(self._path)

    def _passed(self, iterator: Iterator[Any]) -> Any:
        """Skips the batches measured before and returns the next one."""
        batch = next(iterator, _END)
        for k in range(self.batches_before):
            batch = next(iterator, _END)
            if batch is _END:
                raise ValueError(self._too_few(k + 1))
        self._set_random_states("left")
        self._before = {}
        return batch

    def _set_random_states(self, group: str) -> None:
        """Those of the file, if there is one."""
        states = tensor_file.under(group, self._before)
        if self._before and "cpu" not in states:
            raise ValueError(self._damaged(f"{group}/cpu is missing"))
        try:
            for device, state in states.items():
                if device == "cpu":
                    torch.set_rng_state(state)
                else:
                    torch.cuda.set_rng_state(state, device)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # without CUDA
            raise ValueError(self._damaged(f"{group}: {error}")) from error

    def _damaged(self, why: object) -> str:
        return (
            f"checkpoint: {str(self._path)!r} is damaged ({why}); use another copy, or delete the "
            "file to begin anew"
        )

    def _too_few(self, batches: int) -> str:
        return (
            f"data: it has at most {batches} batches, but the checkpoint {str(self._path)!r} was "
            f"saved after {self.batches_before} batches with more to come; pass the same batches "
            "in the same order, or delete the file to begin anew"
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
                f"{source} is no measurement that this version of mas_ext saved; name another file "
                "(what save() made is another kind of file)"
            )
        before = settings.get("about")
        if not isinstance(before, dict) or (age := _age(before)) is None:
            raise ValueError(self._damaged("it does not say of which measurement it is"))
        if age < _age(self._about):
            raise _Ended
        for key, now in self._about.items():
            if before.get(key) != now:
                raise ValueError(
                    f"{source} is of another measurement: its {key} is {before.get(key)!r}, here "
                    f"it is {now!r}. Finish that measurement, or delete the file to begin anew"
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
    """The file belongs to a measurement that has ended and is already part of the state."""


def _age(about: Mapping[str, Any]) -> Any:
    """A pair that grows with every measurement that ends; None if it cannot be told."""
    tasks, samples = about.get("tasks"), about.get("samples before")
    counts: list[Any] = [tasks, *samples.values()] if isinstance(samples, dict) else [None]
    return (tasks, sum(counts[1:])) if all(map(is_whole, counts)) else None


def _own(path: Path_, about: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """This process's file, and the description that is stored in it."""
    said = json.loads(json.dumps(about))  # in the form in which it will be read back
    if not is_running():
        return Path(path), {**said, "processes": 1}
    own = f"{os.fspath(path)}.rank{torch.distributed.get_rank()}"
    return Path(own), {**said, "processes": torch.distributed.get_world_size()}


def _random_states(devices: Iterable[torch.device]) -> dict[str, Tensor]:
    """The states of PyTorch's random number generators, by device."""
    cuda = {str(device): torch.cuda.get_rng_state(device) for device in devices}
    return {"cpu": torch.get_rng_state(), **cuda}


def _check_sums(found: Tensors, sums: Tensors) -> None:
    """Raises ValueError unless these can be the sums of a measurement that was stopped."""
    if found.keys() != sums.keys():
        raise ValueError("it has the sums of other parameters")
    for name, value in found.items():
        if (value.shape, value.dtype) != (sums[name].shape, sums[name].dtype):
            raise ValueError(f"the sums of {name!r} have another shape or dtype")
        if not are_finite(value):
            raise ValueError(f"the sums of {name!r} have NaN, Inf or negative numbers")


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(params: Tensors) -> str:
    """A hash that identifies θ: names, shapes, dtypes, and a sum over the bits of each tensor.

    The sum of integers does not depend on the order in which the elements are added.
    """
    digest = hashlib.sha256()
    for name, p in params.items():
        bits = local(p).detach().contiguous().view(_INTEGERS[p.dtype.itemsize])
        digest.update(f"{name} {list(bits.shape)} {p.dtype} {int(bits.sum())}\n".encode())
    return digest.hexdigest()[:16]
