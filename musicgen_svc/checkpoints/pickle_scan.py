"""What a pickle would make, counted from its opcodes before anything is made of them.

torch.load with `weights_only` calls nothing but a list of harmless functions. Harmless is not cheap: an
encoding doubles a text each time, a list can be copied as often as it is named, `bytearray(n)` takes n bytes,
and the hash of nested tuples visits each of them as often as it is reached. So a pickle is limited to 8 MiB
and a million opcodes, calls may be given ten million entries in all, and a zip's entries are stored as they
are, not compressed. A released `large` has 20,000 opcodes in 120 KB, a training's checkpoint some ten times
that.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 1_000_000
MAX_GIVEN = 10_000_000
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages
_REFUSED = ("_codecs encode", "builtins bytearray", "__builtin__ bytearray", "torch Tensor")
_PUTS = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_GETS = ("BINGET", "LONG_BINGET", "GET")
_KEYED = ("SETITEM", "SETITEMS", "DICT")
_ADDING = ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS")
_CALLS = ("REDUCE", "NEWOBJ", "BUILD")


class Costly(ValueError):
    """Reading the pickle could take more time or memory than its size tells."""


def scan_torch_file(path: Path, *, zipped: bool) -> None:
    """Goes through the pickles of a torch.save file.

    Args:
        zipped: whether it has the layout of torch 1.6 and later.

    Raises:
        Costly: a bound is exceeded.
        ValueError, IndexError, KeyError: it is no pickle.
    """
    if not zipped:
        with path.open("rb") as file:
            start = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        for _ in range(_LEGACY_PICKLES):
            _scan(start)
        return
    with zipfile.ZipFile(path) as file:
        packed = [entry for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise Costly(f"its entry {packed[0].filename!r:.80} is compressed, which torch.save never does")
        name = next(name for name in file.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        if file.getinfo(name).file_size > MAX_PICKLE_BYTES:
            raise Costly(f"its pickle takes more than {MAX_PICKLE_BYTES} bytes, without any tensor's numbers")
        _scan(io.BytesIO(file.read(name)))


class _Thing:
    """Something on the pickle's stack: what is known of it without making it."""

    __slots__ = ("is_tuple", "name", "size")

    def __init__(self, name: str = "", size: int = 1, *, is_tuple: bool = False) -> None:
        self.name, self.size, self.is_tuple = name, size, is_tuple


_MARK = _Thing("mark")


def _scan(file: io.BytesIO) -> None:
    stack: list[_Thing] = []
    memo: dict[int, _Thing] = {}
    given = 0
    for count, (opcode, argument) in enumerate(_opcodes(file)):
        if count >= MAX_OPCODES:
            raise Costly(f"its pickle has more than {MAX_OPCODES} opcodes")
        if opcode.name in _PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif opcode.name in _GETS:
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(_MARK)
        else:
            taken = _taken(stack, opcode)
            given += _given(opcode.name, taken)
            if given > MAX_GIVEN:
                raise Costly(f"its pickle gives more than {MAX_GIVEN} entries to what it calls")
            _push(stack, opcode, argument, taken)


def _opcodes(file: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    for opcode, argument, _ in pickletools.genops(file):
        yield opcode, argument


def _taken(stack: list[_Thing], opcode: pickletools.OpcodeInfo) -> list[_Thing]:
    """What the opcode takes from the stack; where that begins with a mark, all that lies above the mark."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        taken: list[_Thing] = []
        while (top := stack.pop()) is not _MARK:
            taken.append(top)
        under = before.index(pickletools.markobject)
        return [stack.pop() for _ in range(under)][::-1] + taken[::-1]
    return [stack.pop() for _ in before][::-1]


def _given(name: str, taken: list[_Thing]) -> int:
    """How many entries a call is given; and whether that is one that is refused."""
    if name in _KEYED:
        keys = taken if name == "DICT" else taken[1:]
        if any(key.is_tuple for key in keys[::2]):
            raise Costly("its pickle has a tuple for a name in a dictionary")
    if name not in _CALLS:
        return 0
    if name != "BUILD" and taken[0].name in _REFUSED:
        raise Costly(f"it calls {taken[0].name.replace(' ', '.')}, which is not read")
    return taken[-1].size


def _push(stack: list[_Thing], opcode: pickletools.OpcodeInfo, argument: Any, taken: list[_Thing]) -> None:
    if opcode.name in ("POP", "POP_MARK", "STOP", "PROTO", "FRAME"):
        return
    if opcode.name in _ADDING:
        taken[0].size += sum(1 for _ in taken[1:])
        stack.append(taken[0])
    elif opcode.name == "BUILD":
        stack.append(taken[0])
    elif opcode.name == "GLOBAL":
        stack.append(_Thing(argument))
    elif opcode.name.startswith(("TUPLE", "EMPTY_TUPLE")):
        stack.append(_Thing(size=sum(thing.size for thing in taken), is_tuple=True))
    elif opcode.name in ("LIST", "DICT"):
        stack.append(_Thing(size=len(taken)))
    else:
        size = len(argument) if isinstance(argument, str | bytes) else 1
        size = taken[-1].size if opcode.name in _CALLS else size
        stack += [_Thing(size=size) for _ in opcode.stack_after]
