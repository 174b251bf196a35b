"""Counts from the opcodes of a pickle what it would make, before it is unpickled.

With `weights_only`, torch.load calls only functions from a list of harmless ones. Harmless calls can still be
expensive: an encoding doubles a text each time, a list can be copied as often as it is named, `bytearray(n)`
takes n bytes, and the hash of nested tuples visits each of them as often as it is reached. Therefore a pickle
has at most 8 MiB and a million opcodes, the arguments of its calls have at most ten million entries in all,
and a zip's entries must be stored without compression. A released `large` has 20,000
opcodes in 120 KB, and a training's checkpoint about ten times that.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 1_000_000
MAX_CALL_ENTRIES = 10_000_000
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages
_REFUSED_CALLS = ("_codecs encode", "builtins bytearray", "__builtin__ bytearray", "torch Tensor")

_STORE_OPCODES = ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE")
_FETCH_OPCODES = ("BINGET", "LONG_BINGET", "GET")
_KEY_OPCODES = ("SETITEM", "SETITEMS", "DICT")
_EXTEND_OPCODES = ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS")
_CALL_OPCODES = ("REDUCE", "NEWOBJ", "BUILD")


class CostlyPickleError(ValueError):
    """Reading the pickle could take more time or memory than its size suggests."""


def scan_torch_file(path: Path, *, zipped: bool) -> None:
    """Checks the pickles of a torch.save file against the bounds of this module.

    Args:
        zipped: whether the file has the layout of torch 1.6 and later.

    Raises:
        CostlyPickleError: a bound is exceeded.
        ValueError, IndexError, KeyError: it is not a pickle.
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
            raise CostlyPickleError(
                f"its entry {packed[0].filename!r:.80} is compressed, which torch.save never does"
            )
        name = next(name for name in file.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        if file.getinfo(name).file_size > MAX_PICKLE_BYTES:
            raise CostlyPickleError(
                f"its pickle takes more than {MAX_PICKLE_BYTES} bytes, without any tensor's numbers"
            )
        _scan(io.BytesIO(file.read(name)))


class _StackItem:
    """One object on the pickle's stack: what is known of it without making it."""

    __slots__ = ("entries", "is_tuple", "name")

    def __init__(self, name: str = "", entries: int = 1, *, is_tuple: bool = False) -> None:
        """Describes an object.

        Args:
            name: module and name of a function or class, with a space between; else empty.
            entries: how many entries or characters the object holds.
        """
        self.name, self.entries, self.is_tuple = name, entries, is_tuple


_MARK = _StackItem("mark")


def _scan(file: io.BytesIO) -> None:
    """Runs one pickle's opcodes on a stack of `_StackItem`.

    Raises:
        CostlyPickleError: a bound is exceeded.
        ValueError, IndexError, KeyError: it is not a pickle.
    """
    stack: list[_StackItem] = []
    memo: dict[int, _StackItem] = {}
    passed = 0  # entries to calls
    opcodes: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(file)
    for count, (opcode, argument, _) in enumerate(opcodes):
        if count >= MAX_OPCODES:
            raise CostlyPickleError(f"its pickle has more than {MAX_OPCODES} opcodes")
        if opcode.name in _STORE_OPCODES:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif opcode.name in _FETCH_OPCODES:
            stack.append(memo[argument])
        elif opcode.name == "MARK":
            stack.append(_MARK)
        else:
            operands = _pop_operands(stack, opcode)
            _check_keys(opcode.name, operands)
            passed += _entries_passed(opcode.name, operands)
            if passed > MAX_CALL_ENTRIES:
                raise CostlyPickleError(
                    f"its pickle passes more than {MAX_CALL_ENTRIES} entries to the functions that it calls"
                )
            _push_results(stack, opcode, argument, operands)


def _pop_operands(stack: list[_StackItem], opcode: pickletools.OpcodeInfo) -> list[_StackItem]:
    """Pops what the opcode takes from the stack: a fixed number, or everything down to the last mark."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        above_mark: list[_StackItem] = []
        while (top := stack.pop()) is not _MARK:
            above_mark.append(top)
        below_mark = before.index(pickletools.markobject)
        return [stack.pop() for _ in range(below_mark)][::-1] + above_mark[::-1]
    return [stack.pop() for _ in before][::-1]


def _check_keys(opcode: str, operands: list[_StackItem]) -> None:
    """Refuses tuples as a dictionary's keys: hashing nested ones can take exponential time.

    Raises:
        CostlyPickleError: a key is a tuple.
    """
    if opcode in _KEY_OPCODES:
        pairs = operands if opcode == "DICT" else operands[1:]
        if any(key.is_tuple for key in pairs[::2]):
            raise CostlyPickleError("its pickle has a tuple for a name in a dictionary")


def _entries_passed(opcode: str, operands: list[_StackItem]) -> int:
    """How many entries the opcode passes to a function that it calls; 0 if it calls none.

    Raises:
        CostlyPickleError: the function is one of those that are refused.
    """
    if opcode not in _CALL_OPCODES:
        return 0
    if opcode != "BUILD" and operands[0].name in _REFUSED_CALLS:
        raise CostlyPickleError(f"it calls {operands[0].name.replace(' ', '.')}, which is not read")
    return operands[-1].entries


def _push_results(
    stack: list[_StackItem], opcode: pickletools.OpcodeInfo, argument: Any, operands: list[_StackItem]
) -> None:
    """Pushes what the opcode leaves on the stack."""
    if opcode.name in ("POP", "POP_MARK", "STOP", "PROTO", "FRAME"):
        return
    if opcode.name in _EXTEND_OPCODES:
        operands[0].entries += len(operands) - 1
        stack.append(operands[0])
    elif opcode.name == "BUILD":
        stack.append(operands[0])
    elif opcode.name == "GLOBAL":
        stack.append(_StackItem(argument))
    elif opcode.name.startswith(("TUPLE", "EMPTY_TUPLE")):
        stack.append(_StackItem(entries=sum(item.entries for item in operands), is_tuple=True))
    elif opcode.name in ("LIST", "DICT"):
        stack.append(_StackItem(entries=len(operands)))
    else:
        entries = len(argument) if isinstance(argument, str | bytes) else 1
        entries = operands[-1].entries if opcode.name in _CALL_OPCODES else entries
        stack += [_StackItem(entries=entries) for _ in opcode.stack_after]
