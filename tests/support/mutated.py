"""Files with faults in them, as a bad disk, a bad program or an attacker makes them.

``mutated(content, chance)`` changes a safetensors file, and ``mutated_json`` one of JSON. All is
drawn from ``chance``, so that the same seed gives the same file. To cover another fault, write a
function of a :class:`File` or of bytes, and add it to one of the lists below.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

DTYPES = {  # of safetensors: torch's, and bytes
    "F64": (torch.float64, 8), "F32": (torch.float32, 4), "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2), "I64": (torch.int64, 8), "I32": (torch.int32, 4),
    "I16": (torch.int16, 2), "I8": (torch.int8, 1), "U8": (torch.uint8, 1),
    "BOOL": (torch.bool, 1), "F8_E4M3": (torch.float8_e4m3fn, 1), "C64": (torch.complex64, 8),
}  # fmt: skip
NESTED = "@nested "  # a string that becomes lists in lists, deeper than json.dumps can write
ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 1.5, -0.5, 1e308, 1e-320, math.nan, math.inf, -math.inf,
    2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 10**400, "", "x", "auto", "0.weight", "*", "\0",
    "\ud800", "é" * 50, "a" * 5000, [], {}, [1], [[]], {"": 0}, {"x": {"y": []}}, [None] * 20,
    ["ema", 0.5], ["ema", 2], "sum_of_sums", "max", f"{NESTED}90", f"{NESTED}400", f"{NESTED}900",
    f"{NESTED}100000",
]  # fmt: skip
SIZES = [0, 1, 2, 3, 5, 8, 255, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, -1, -(2**31)]
FLOATS = [
    math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 1e-40, 1e38, -1e38, 1e300, -1e-30, 7.0,
]  # fmt: skip
FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


@dataclass
class Entry:
    """A tensor in a file."""

    name: Any
    dtype: Any
    shape: Any
    data: bytes

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]


Pairs = list[list[Any]]  # of a JSON object in which a key may occur twice


@dataclass
class File:
    """A safetensors file, taken apart.

    Attributes:
        settings: what mas_ext stores as JSON; None for another file.
        edits: what is done to the header once it says where the tensors are.
    """

    metadata: Any
    settings: Any
    entries: list[Entry]
    edits: list[Callable[[Pairs], Any]] = field(default_factory=list)

    @classmethod
    def of(cls, content: bytes) -> File:
        header, payload = _taken_apart(content)
        metadata = header.pop("__metadata__", None)
        entries = [
            Entry(name, one["dtype"], one["shape"], payload[slice(*one["data_offsets"])])
            for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        ]
        settings = json.loads(metadata["state"]) if metadata and "state" in metadata else None
        return cls(metadata, settings, entries)

    def content(self, is_repaired: bool) -> bytes:
        """The bytes; ``is_repaired``: with the checksum that belongs to them."""
        metadata, end = self.metadata, 0
        if self.settings is not None and isinstance(metadata, dict) and "state" in metadata:
            metadata = {**metadata, "state": _written(self.settings)}
        pairs: Pairs = [] if metadata is None else [["__metadata__", metadata]]
        for one in self.entries:
            begin, end = end, end + len(one.data)
            place = {"dtype": one.dtype, "shape": one.shape, "data_offsets": [begin, end]}
            pairs.append([one.name, place])
        for edit in self.edits:
            edit(pairs)
        header = ",".join(f"{_written(str(key))}:{_written(value)}" for key, value in pairs)
        payload = b"".join(one.data for one in self.entries)
        content = _joined(f"{{{header}}}".encode(), payload)
        return repaired(content) if is_repaired else content


def _taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header, content[length:]


def _joined(header: bytes, payload: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload


def _written(value: Any) -> str:
    text = json.dumps(value)
    while (begin := text.find(f'"{NESTED}')) >= 0:
        depth, rest = text[begin + len(NESTED) + 1 :].split('"', 1)
        text = text[:begin] + "[" * int(depth) + "]" * int(depth) + rest
    return text


def repaired(content: bytes) -> bytes:
    """With the checksum that belongs to the content, if it is a state that can be read."""
    try:
        header, payload = _taken_apart(content)
        metadata = header.pop("__metadata__")
        found, digest = metadata["sha256"], hashlib.sha256(metadata["state"].encode())
        for name, one in sorted(header.items()):
            dtype, _ = DTYPES[one["dtype"]]
            digest.update(f"\0{name}\0{dtype}\0{one['shape']}\0".encode())
            digest.update(payload[slice(*one["data_offsets"])])
        return content.replace(found.encode(), digest.hexdigest().encode(), 1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return content


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors of a file, read by other code than that under test."""
    found = {}
    for one in File.of(content).entries:
        data = bytearray(one.data)
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        found[one.name] = flat.view(DTYPES[one.dtype][0]).view(one.shape).clone()
    return found


# -- Faults in the bytes ---------------------------------------------------------------------------
def flip_a_bit(content: bytearray, chance: Random) -> None:
    position = chance.randrange(len(content))
    content[position] ^= 1 << chance.randrange(8)


def flip_a_bit_at_the_beginning(content: bytearray, chance: Random) -> None:
    position = chance.randrange(min(len(content), 2000))
    content[position] ^= 1 << chance.randrange(8)


def flip_a_bit_at_the_end(content: bytearray, chance: Random) -> None:
    position = chance.randrange(len(content) * 3 // 4, len(content))
    content[position] ^= 1 << chance.randrange(8)


def truncate(content: bytearray, chance: Random) -> None:
    del content[chance.randrange(len(content)) :]


def truncate_a_little(content: bytearray, chance: Random) -> None:
    del content[-chance.randrange(1, 16) :]


def append(content: bytearray, chance: Random) -> None:
    more = [bytes(chance.randrange(1, 64)), chance.randbytes(40), bytes(content), b" ", b"}"]
    content += chance.choice(more)


def insert(content: bytearray, chance: Random) -> None:
    position = chance.randrange(len(content))
    content[position:position] = chance.randbytes(chance.randrange(1, 9))


def cut_out(content: bytearray, chance: Random) -> None:
    position = chance.randrange(len(content))
    del content[position : position + chance.randrange(1, 9)]


def erase(content: bytearray, chance: Random) -> None:
    position = chance.randrange(len(content))
    size = min(chance.randrange(1, 513), len(content) - position)
    content[position : position + size] = bytes(size)


def exchange(content: bytearray, chance: Random) -> None:
    size = chance.randrange(1, 65)
    a, b = (chance.randrange(max(len(content) - size, 1)) for _ in range(2))
    content[a : a + size], content[b : b + size] = content[b : b + size], content[a : a + size]


def change_the_length_of_the_header(content: bytearray, chance: Random) -> None:
    now = int.from_bytes(content[:8], "little")
    others = [0, 1, 2, now - 1, now + 1, now + 8, now - 8, len(content), len(content) - 8, 2**27]
    length = chance.choice([*others, 2**31, 2**32 + now, 2**63, 2**64 - 1, 100_000_000])
    content[:8] = (max(length, 0) % 2**64).to_bytes(8, "little")


BYTES = [
    flip_a_bit, flip_a_bit_at_the_beginning, flip_a_bit_at_the_end, truncate, truncate_a_little,
    append, insert, cut_out, erase, exchange, change_the_length_of_the_header,
]  # fmt: skip


# -- Faults in the header --------------------------------------------------------------------------
def _edited(file: File, chance: Random, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits what the header says of one tensor."""
    if file.entries:
        name = chance.choice(file.entries).name
        file.edits.append(lambda pairs: [edit(one) for key, one in pairs if key == name])


def change_a_shape(file: File, chance: Random) -> None:
    shapes: list[Any] = [chance.choice(ODD), [chance.choice(SIZES)], [2**32, 2**32]]
    shapes += [[0, chance.choice(SIZES)], [chance.choice(SIZES), 1, chance.choice(SIZES)], [1] * 70]
    shape = chance.choice(shapes)
    _edited(file, chance, lambda one: one.update(shape=shape))


def change_a_size(file: File, chance: Random) -> None:
    size, where = chance.choice(SIZES), chance.random()

    def edit(one: dict[str, Any]) -> None:
        if one["shape"]:
            one["shape"] = [*one["shape"]]
            one["shape"][int(where * len(one["shape"]))] = size

    _edited(file, chance, edit)


def change_a_dtype(file: File, chance: Random) -> None:
    dtype = chance.choice(
        [*DTYPES, "F4", "F8_E5M2", "F8_E8M0", "U64", "U16", "X", chance.choice(ODD)]
    )
    _edited(file, chance, lambda one: one.update(dtype=dtype))


def change_offsets(file: File, chance: Random) -> None:
    a, b = chance.choice([*SIZES, *range(-9, 10)]), chance.choice(SIZES)
    kind = chance.randrange(5)

    def edit(one: dict[str, Any]) -> None:
        begin, end = one["data_offsets"]
        others = [[begin + a, end + a], [end, begin], [begin, end + a], [a, b], chance.choice(ODD)]
        one["data_offsets"] = others[kind]

    _edited(file, chance, edit)


def drop_or_add_a_key(file: File, chance: Random) -> None:
    key, value = chance.choice(["dtype", "shape", "data_offsets"]), chance.choice(ODD)
    if chance.random() < 0.5:
        _edited(file, chance, lambda one: one.pop(key, None))
    else:
        _edited(file, chance, lambda one: one.update({key + "s": value}))


def repeat_an_entry(file: File, chance: Random) -> None:
    position, other = chance.random(), chance.random()

    def edit(pairs: Pairs) -> None:
        if pairs:
            name, _ = pairs[int(position * len(pairs))]
            _, one = pairs[int(other * len(pairs))]
            pairs.append([name, one])

    file.edits.append(edit)


def exchange_places(file: File, chance: Random) -> None:
    def edit(pairs: Pairs) -> None:
        own = [one for key, one in pairs if key != "__metadata__"]
        if len(own) > 1:
            a, b = chance.sample(own, 2)
            key = chance.choice(["data_offsets", "shape", "dtype"])
            a[key], b[key] = b[key], a[key]

    file.edits.append(edit)


def change_metadata(file: File, chance: Random) -> None:
    if not isinstance(file.metadata, dict) or chance.random() < 0.2:
        file.metadata = chance.choice(ODD)
        return
    key = chance.choice([*file.metadata, "x"])
    file.metadata = {
        **file.metadata,
        key: chance.choice([*ODD, "{}", "[]", "null", "1", "[[", "{"]),
    }
    if chance.random() < 0.3:
        del file.metadata[key]


def change_the_text_of_the_settings(file: File, chance: Random) -> None:
    """Not through JSON, so it need not be JSON any more."""
    if isinstance(file.metadata, dict) and file.settings is not None:
        text, file.settings = bytearray(_written(file.settings).encode()), None
        chance.choice(BYTES[:-1])(text, chance)
        file.metadata = {**file.metadata, "state": text.decode("utf-8", "replace")}


HEADER = [
    change_a_shape, change_a_size, change_a_dtype, change_offsets, drop_or_add_a_key,
    repeat_an_entry, exchange_places, change_metadata, change_the_text_of_the_settings,
]  # fmt: skip


# -- Faults in the tensors, of which the header says the truth -------------------------------------
def _one(file: File, chance: Random) -> Entry:
    return chance.choice(file.entries)


def rename(file: File, chance: Random) -> None:
    one, other = _one(file, chance), _one(file, chance)
    groups = ["importance", "anchor", "open", "earlier", "sums", "adapters", "references", "left"]
    _, _, rest = str(one.name).partition("/")
    names = [f"{one.name}x", f"{chance.choice(groups)}/{rest}", "", "x", "/", rest, "\ud800", "\0"]
    one.name = chance.choice([*names, f"{other.name}/a", "importance/", "é" * 99, "x" * 5000])


def drop(file: File, chance: Random) -> None:
    file.entries.remove(_one(file, chance))


def copy_to_another_name(file: File, chance: Random) -> None:
    one, names = _one(file, chance), [f"{_one(file, chance).name}2", "x", "importance/x", "began/x"]
    name = chance.choice([*names, "adapters/0.weight/fingerprint", "references/0/0/before/7"])
    file.entries.append(Entry(name, one.dtype, one.shape, one.data))


def exchange_names(file: File, chance: Random) -> None:
    a, b = _one(file, chance), _one(file, chance)
    a.name, b.name = b.name, a.name


def exchange_data(file: File, chance: Random) -> None:
    a, b = _one(file, chance), _one(file, chance)
    if len(a.data) == len(b.data):
        a.data, b.data = b.data, a.data


def exchange_contents(file: File, chance: Random) -> None:
    a, b = _one(file, chance), _one(file, chance)
    a.dtype, b.dtype, a.shape, b.shape = b.dtype, a.dtype, b.shape, a.shape
    a.data, b.data = b.data, a.data


def reshape(file: File, chance: Random) -> None:
    one = _one(file, chance)
    numel = math.prod(one.shape)
    shapes = [[numel], [*one.shape, 1], [1, *one.shape], list(reversed(one.shape))]
    one.shape = chance.choice([*shapes, [numel // 2, 2] if numel % 2 == 0 else [1, numel, 1]])


def resize(file: File, chance: Random) -> None:
    one = _one(file, chance)
    sizes = [[], [0], [1], [0, 2**40], [2, 3], *([n, *one.shape[1:]] for n in (0, 1, 3, 9))]
    one.shape = chance.choice(sizes)
    length = math.prod(one.shape) * one.itemsize
    one.data = (one.data * (length // max(len(one.data), 1) + 1))[:length].ljust(length, b"\0")


def retype(file: File, chance: Random) -> None:
    """Other numbers of as many bytes, in the same shape if they fit."""
    one = _one(file, chance)
    size = one.itemsize
    one.dtype = chance.choice([d for d, (_, n) in DTYPES.items() if n == size or n == 2 * size])
    if one.itemsize != size:
        one.data = one.data + one.data


def convert(file: File, chance: Random) -> None:
    """The same numbers in another dtype."""
    one = _one(file, chance)
    dtype = chance.choice([d for d in DTYPES if d not in ("F8_E4M3", "C64")])
    if one.dtype in ("F8_E4M3", "C64"):
        return
    values = torch.frombuffer(bytearray(one.data or bytes(16)), dtype=DTYPES[one.dtype][0])
    new = values[: math.prod(one.shape)].to(DTYPES[dtype][0])
    one.dtype, one.data = dtype, bytes(new.view(torch.uint8).tolist())


def poke(file: File, chance: Random) -> None:
    """One number becomes NaN, negative, huge or the like."""
    floats = [one for one in file.entries if one.dtype in FORMATS and one.data]
    if not floats:
        return
    one = chance.choice(floats)
    form, size = FORMATS[one.dtype], one.itemsize
    position = chance.randrange(len(one.data) // size) * size
    try:
        number = struct.pack(form, chance.choice(FLOATS))
    except OverflowError:
        return
    one.data = one.data[:position] + number + one.data[position + size :]


def overwrite(file: File, chance: Random) -> None:
    one = _one(file, chance)
    position = chance.randrange(len(one.data) + 1)
    noise = chance.randbytes(min(chance.randrange(1, 40), len(one.data) - position))
    one.data = one.data[:position] + noise + one.data[position + len(noise) :]


TENSORS = [
    rename, drop, copy_to_another_name, exchange_names, exchange_data, exchange_contents, reshape,
    resize, retype, convert, poke, poke, overwrite,
]  # fmt: skip


# -- Faults in JSON --------------------------------------------------------------------------------
def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container in a value, with each of its keys."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            _places(value[key], found)
    return found


def change_json(value: Any, chance: Random) -> Any:
    """Changes one value somewhere in it; returns it, or another one in its place."""
    places = _places(value, [])
    if not places or chance.random() < 0.03:
        return chance.choice(ODD)
    top = [place for place in places if place[0] is value]
    holder, key = chance.choice(top if chance.random() < 0.4 else places)
    other, other_key = chance.choice(places)
    kind = chance.choice(["replace", "number", "drop", "add", "rename", "exchange", "wrap"])
    if kind == "number" and isinstance(holder[key], (int, float)):
        holder[key] = chance.choice([-holder[key], holder[key] + 1, holder[key] * 1000, 0, -1, 7])
    elif kind == "drop":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[chance.choice(["x", "0.weight", "", "2.bias", "tensor"])] = chance.choice(ODD)
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "exchange":
        one, two = json.dumps(holder[key]), json.dumps(other[other_key])
        holder[key], other[other_key] = json.loads(two), json.loads(one)
    elif kind == "wrap":
        holder[key] = chance.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
    else:
        holder[key] = chance.choice(ODD)
    return value


def change_settings(file: File, chance: Random) -> None:
    if file.settings is not None:
        file.settings = change_json(file.settings, chance)


# -- Whole files -----------------------------------------------------------------------------------
def mutated(content: bytes, chance: Random) -> tuple[bytes, str, bool]:
    """A safetensors file with one fault to three, their names, and whether they can be noticed.

    They cannot where the checksum is computed again.
    """
    is_repaired, done = chance.random() < 0.8, []
    if chance.random() < 0.25:
        changed = bytearray(content)
        for _ in range(chance.choice([1, 1, 2])):
            done.append(chance.choice(BYTES))
            if changed:
                done[-1](changed, chance)
        result = repaired(bytes(changed)) if is_repaired else bytes(changed)
    else:
        file = File.of(content)
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            kinds = [HEADER, *[TENSORS] * 2, *[[change_settings]] * 3 * (file.settings is not None)]
            done.append(chance.choice(chance.choice(kinds)))
            if file.entries:
                done[-1](file, chance)
        result = file.content(is_repaired)
    names = ", ".join(one.__name__ for one in done)
    return result, names, not is_repaired


def mutated_json(content: bytes, chance: Random) -> tuple[bytes, str, bool]:
    """A JSON file with one fault or two, and their names; it has no checksum."""
    if chance.random() < 0.3:
        changed = bytearray(content)
        fault = chance.choice(BYTES[:-1])
        fault(changed, chance)
        return bytes(changed), fault.__name__, False
    value = json.loads(content)
    for _ in range(chance.choice([1, 1, 2])):
        value = change_json(value, chance)
    return _written(value).encode(), change_json.__name__, False
