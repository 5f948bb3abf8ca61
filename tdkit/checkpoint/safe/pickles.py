"""Read a pickle without running it: follow its instructions with inert stand-ins.

torch's weights-only reader is the gate; this scan comes before it. It names everything the file
refers to in one message, and refuses what the gate would let pass: calls of allowed classes with
arguments of the file's choosing, tensors larger than the file, state that replaces methods.
"""

from __future__ import annotations

import pickletools
import struct
import warnings
from _compat_pickle import IMPORT_MAPPING
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import nn

from tdkit.checkpoint.safe.constructors import (
    STORAGES,
    Array,
    Counted,
    Global,
    Inert,
    Ordered,
    Storage,
    call,
    is_dtype_state,
    is_partial_state,
    is_primitive,
    torch_provides,
)
from tdkit.checkpoint.safe.refusals import refuse_unlisted
from tdkit.checkpoint.text import shown
from tdkit.errors import TdkitError, UnreadableFileError, UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tdkit.checkpoint.safe.classes import Allowlist

MOST_BYTES = 2**24
MOST_STEPS = 2_000_000
_MOST_COPIED = 2**27
_MODULE_BYTES = 4096
_ENTRY_BYTES = 64
_MOST_LAYERS = 10_000
_MOST_VIEWS = 16

_PUSH_NAMES = """
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING
    UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
"""
_PUSH = frozenset(_PUSH_NAMES.split())
_TORCH_READS_NAMES = """
    GLOBAL NEWOBJ REDUCE BUILD APPEND APPENDS SETITEM SETITEMS MARK TUPLE TUPLE1 TUPLE2 TUPLE3
    NONE NEWFALSE NEWTRUE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET BININT BININT1 BININT2
    BINFLOAT BINUNICODE SHORT_BINSTRING BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT LONG1
    PROTO STOP
"""
_TORCH_READS = frozenset(_TORCH_READS_NAMES.split())
_DISTRUST = "model files have no need to; do not trust it"
_BROKEN = (
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    struct.error,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclass(frozen=True)
class Scan:
    """What a pickle holds.

    Args:
        root: The stand-in of the object.
        names: Dotted names on the allow-list that it uses, with what they mean.
        numpy: Whether it holds NumPy scalars.
        storages: Key to the storage that it declares.
    """

    root: Any
    names: Mapping[str, Any]
    numpy: bool
    storages: Mapping[str, Storage]


@dataclass
class _Made:
    """An object of an allow-listed class."""

    cls: Global
    built: bool = False


class _Unlisted:
    """Stands for everything that is made with a name that is not on the list."""


_UNLISTED = _Unlisted()


def scan(stream: BinaryIO, allowlist: Allowlist, source: object) -> Scan:
    """Follow one pickle up to its end and leave the stream behind it.

    Args:
        stream: Where the pickle starts.
        allowlist: What it may name.
        source: The file, for messages.

    Raises:
        UnsafeFileError: If it names or does anything that model files have no need for.
        UnreadableFileError: If it is damaged, or of a kind that torch's safe reader cannot read.
    """
    machine = _Machine(allowlist)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, arg in _steps(stream):
                machine.step(name, arg)
        machine.finish()
    except (TdkitError, *_BROKEN) as error:
        if machine.unlisted:
            refuse_unlisted(source, machine.unlisted)
        if isinstance(error, TdkitError):
            raise type(error)(f"{source}: {error}", error.hint) from error
        raise UnreadableFileError(
            f"{source} is damaged: its description of the model cannot be followed",
            "copy or download it again",
        ) from error
    if machine.unlisted:
        refuse_unlisted(source, machine.unlisted)
    return Scan(machine.root, machine.names, machine.numpy, machine.storages)


def _steps(stream: BinaryIO) -> Any:
    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_STEPS:
            raise UnsafeFileError(
                f"its description of the model takes more than {MOST_STEPS:,} steps",
                "save the model's state_dict alone",
            )
        yield opcode.name, arg


@dataclass
class _Machine:
    """A pickle machine whose every value is inert; torch's, opcode by opcode."""

    allowlist: Allowlist
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    names: dict[str, Any] = field(default_factory=dict)
    numpy: bool = False
    storages: dict[str, Storage] = field(default_factory=dict)
    unlisted: dict[str, str] = field(default_factory=dict)
    sealed: dict[int, Any] = field(default_factory=dict)
    foreign: str | None = None
    viewed: int = 0
    copied: int = 0
    root: Any = None

    def __post_init__(self) -> None:
        self.actions: Mapping[str, Callable[[Any], None]] = {
            opcode.name: getattr(self, f"_{opcode.name.lower()}", self._unknown)
            for opcode in pickletools.opcodes
        }

    def step(self, name: str, arg: Any) -> None:
        if name in _PUSH:
            self.stack.append(arg)
        else:
            self.actions[name](arg)
        if name not in _TORCH_READS and self.foreign is None:
            self.foreign = f"the pickle instruction {name}"

    def finish(self) -> None:
        """Judge what only shows at the end.

        Raises:
            UnreadableFileError: If torch's safe reader does not know an opcode that was met.
            UnsafeFileError: If tensors view the stored bytes many times over.
        """
        if self.foreign is not None:
            raise UnreadableFileError(
                f"torch's safe reader cannot read it, because it uses {self.foreign}",
                "save it again with torch.save(model, path) and its default pickle_protocol=2",
            )
        stored = sum(storage.numel * storage.itemsize for storage in self.storages.values())
        if self.viewed > _MOST_VIEWS * stored + 2**20:
            raise UnsafeFileError(
                f"its tensors take {self.viewed:,} bytes together, but it stores {stored:,}",
                "save it again after calling .clone() on shared tensors",
            )

    # Names and calls

    def _global(self, arg: str) -> None:
        self._find(*arg.split(" "))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._find(str(module), str(name))

    def _find(self, module: str, name: str) -> None:
        # Protocol 2 names modules as Python 2 did: subprocess is commands, builtins __builtin__.
        module = IMPORT_MAPPING.get(module, module)
        path = f"{module}.{name}"
        allowed = self.allowlist.find(path)
        if allowed is not None:
            self.names[path] = allowed.value
            self.stack.append(Global(path, allowed))
        elif torch_provides(path):
            self.numpy |= path.startswith("numpy.")
            self.stack.append(Global(path))
        else:
            self.unlisted[path] = module
            self.stack.append(_UNLISTED)

    def _reduce(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if function is _UNLISTED or (isinstance(args, tuple) and _UNLISTED in args):
            self.stack.append(_UNLISTED)
            return
        if not isinstance(function, Global):
            raise UnsafeFileError("the file calls something that is not a function", _DISTRUST)
        self._seal(args)
        made = call(function, args)
        if isinstance(made, Array):
            self.viewed += made.nbytes
        self.stack.append(made)

    def _newobj(self, _: Any) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if cls is _UNLISTED:
            self.stack.append(_UNLISTED)
            return
        kind = cls.allowed.kind if isinstance(cls, Global) and cls.allowed else None
        if kind == "tuple" and all(map(is_primitive, args)):
            self.stack.append(Inert("tuple"))
        elif kind in ("module", "plain") and args == ():
            self.stack.append(_Made(cls))
        else:
            raise UnsafeFileError(
                f"the file makes {shown(getattr(cls, 'path', 'an object'))} with arguments of its "
                "own choosing",
                _DISTRUST,
            )

    def _build(self, _: Any) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if made is _UNLISTED or state is _UNLISTED:
            return
        self._seal(state)
        if isinstance(made, _Made) and not made.built:
            made.built = True
            self._charge(_MODULE_BYTES)
            _check_state(made, state)
        elif isinstance(made, Inert) and made.kind == "partial":
            _expect(is_partial_state(made, state))
        elif isinstance(made, Inert) and made.kind == "dtype":
            _expect(is_dtype_state(state))
        elif isinstance(made, Ordered):
            _expect(isinstance(state, dict) and set(state) <= {"_metadata"})
        else:
            _expect(False)

    def _binpersid(self, _: Any) -> None:
        saved_id = self.stack.pop()
        kind = saved_id[0] if isinstance(saved_id, tuple) and saved_id else None
        if kind == "module" and len(saved_id) == 4:
            self.foreign = "a whole model in the format from before torch 1.6"
            self.stack.append(saved_id[1])
        elif kind == "storage" and len(saved_id) in (5, 6):
            self.stack.append(self._storage(*saved_id[1:5], *saved_id[5:]))
        else:
            raise UnsafeFileError("the file asks for an object that is not in it", _DISTRUST)

    def _storage(self, cls: Any, key: Any, location: Any, numel: Any, view: Any = None) -> Any:
        if cls is _UNLISTED:
            return _UNLISTED
        itemsize = STORAGES.get(cls.path) if isinstance(cls, Global) else None
        _expect(isinstance(key, str) and isinstance(location, str) and _is_count(numel))
        _expect(itemsize is not None)
        storage = Storage(key, numel, itemsize or 1)
        _expect(self.storages.setdefault(key, storage) == storage)
        if view is None:
            return storage
        name, start, length = view
        _expect(isinstance(name, str) and _is_count(start) and _is_count(length))
        _expect(start + length <= numel)
        return Storage(key, length, storage.itemsize)

    # What was looked at stays as it was, and copies are paid for

    def _seal(self, value: Any, depth: int = 3) -> None:
        if isinstance(value, str | bytes):
            self._charge(len(value))
        elif isinstance(value, dict | list):
            self._charge(len(value) * _ENTRY_BYTES)
            self.sealed[id(value)] = value
        elif isinstance(value, tuple):
            self._charge(len(value) * _ENTRY_BYTES)
            if depth and len(value) <= 16:
                for entry in value:
                    self._seal(entry, depth - 1)

    def _charge(self, size: int) -> None:
        self.copied += size
        if self.copied > _MOST_COPIED:
            raise UnsafeFileError(
                "its description of the model would take far more memory than the file",
                "save the model's state_dict alone",
            )

    # Containers

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _setitems(self, _: Any) -> None:
        self._set_items(self._popped_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is _UNLISTED:
            return
        _expect(type(target) in (dict, Ordered, Counted) and len(items) % 2 == 0)
        _expect(id(target) not in self.sealed)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key is not _UNLISTED:
                _expect(is_primitive(key))
                target[key] = value

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._popped_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if target is not _UNLISTED:
            _expect(type(target) is list and id(target) not in self.sealed)
            target.extend(values)

    def _additems(self, _: Any) -> None:
        self._popped_mark()

    def _frozenset(self, _: Any) -> None:
        self._popped_mark()
        self.stack.append(Inert("set"))

    def _popped_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def _mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _tuple(self, _: Any) -> None:
        self._after_mark(tuple)

    def _list(self, _: Any) -> None:
        self._after_mark(list)

    def _dict(self, _: Any) -> None:
        items = self._popped_mark()
        self.stack.append({})
        self._set_items(items)

    def _after_mark(self, make: type) -> None:
        items = self._popped_mark()
        self.stack.append(make(items))

    def _tuple1(self, _: Any) -> None:
        self._gather(1)

    def _tuple2(self, _: Any) -> None:
        self._gather(2)

    def _tuple3(self, _: Any) -> None:
        self._gather(3)

    def _gather(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    # Constants, the memo and the frame

    def _none(self, _: Any) -> None:
        self.stack.append(None)

    def _newtrue(self, _: Any) -> None:
        self.stack.append(True)

    def _newfalse(self, _: Any) -> None:
        self.stack.append(False)

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_set(self, _: Any) -> None:
        self.stack.append(Inert("set"))

    def _put(self, arg: int) -> None:
        self.memo[arg] = self.stack[-1]

    _binput = _long_binput = _put

    def _get(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    _binget = _long_binget = _get

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _proto(self, arg: int) -> None:
        if arg != 2:
            self.foreign = f"pickle protocol {arg}"

    def _frame(self, _: Any) -> None:
        pass

    def _stop(self, _: Any) -> None:
        self.root = self.stack.pop()

    def _inst(self, arg: str) -> None:
        self._find(*arg.split(" "))
        function = self.stack.pop()
        args = tuple(self._popped_mark())
        self.stack += [function, args]
        self._reduce(None)

    def _obj(self, _: Any) -> None:
        function, *args = self._popped_mark()
        self.stack += [function, tuple(args)]
        self._reduce(None)

    def _unknown(self, _: Any) -> None:
        raise UnreadableFileError(
            "it uses a pickle instruction that torch's safe reader does not know",
            "save it again with torch.save(model, path)",
        )


def _check_state(made: _Made, state: Any) -> None:
    if state is None:
        return
    if not isinstance(state, dict) or any(
        not isinstance(key, str) or key.startswith("__") for key in state
    ):
        raise UnsafeFileError(
            f"the file gives a {shown(made.cls.path)} a state that does not belong in one",
            _DISTRUST,
        )
    # Restoring a recurrent layer loops over its layers before anything else can look at them.
    layers = state.get("num_layers", 1)
    if _is_recurrent(made.cls) and not (_is_count(layers) and layers <= _MOST_LAYERS):
        raise UnsafeFileError(f"the file asks for {shown(layers)} recurrent layers", _DISTRUST)


def _is_recurrent(cls: Global) -> bool:
    return cls.allowed is not None and issubclass(cls.allowed.value, nn.RNNBase)


def _expect(condition: bool) -> None:
    if not condition:
        raise UnsafeFileError(
            "it describes something that ordinary model files never hold",
            "copy or download it again; if that does not help, do not trust it",
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
