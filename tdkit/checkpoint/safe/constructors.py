"""What a model file may call while it is read, and with which arguments.

Ordinary files need little: tensors, parameters, ordered dictionaries and a few small values. Each
rule below looks at the arguments that the file gives and returns an inert stand-in; anything that
would allocate more than the file holds, or install a callable, is refused before torch sees it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from tdkit.checkpoint.text import shown
from tdkit.errors import UnreadableFileError, UnsafeFileError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tdkit.checkpoint.safe.classes import Allowed

STORAGES: Mapping[str, int] = {
    "torch.DoubleStorage": 8,
    "torch.FloatStorage": 4,
    "torch.HalfStorage": 2,
    "torch.BFloat16Storage": 2,
    "torch.LongStorage": 8,
    "torch.IntStorage": 4,
    "torch.ShortStorage": 2,
    "torch.CharStorage": 1,
    "torch.ByteStorage": 1,
    "torch.BoolStorage": 1,
    "torch.ComplexDoubleStorage": 16,
    "torch.ComplexFloatStorage": 8,
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
    "torch.storage.UntypedStorage": 1,
}
"""Storage classes and their bytes per element."""

_VALUES = frozenset(
    {
        "torch.Tensor",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.per_channel_affine",
        "torch.per_channel_symmetric",
        "torch.per_channel_affine_float_qparams",
    }
)
_SCALARS = frozenset(f"{kind}{size}" for kind in "iufc" for size in (1, 2, 4, 8, 16)) | {"b1"}
_PRIMITIVE = (str, bytes, int, float, complex, bool, type(None))
_MOST_SPARSE_ELEMENTS = 2**28


@dataclass(frozen=True)
class Global:
    """A name that the file looks up; ``allowed`` is None for what torch itself provides."""

    path: str
    allowed: Allowed | None = None


@dataclass(frozen=True)
class Storage:
    """The bytes behind tensors: a key, the elements and their size."""

    key: str
    numel: int
    itemsize: int


@dataclass(frozen=True)
class Array:
    """A tensor that the file describes, with the bytes it would take on its own."""

    numel: int
    nbytes: int


@dataclass(frozen=True)
class Inert:
    """Another harmless value, such as a device or a NumPy scalar."""

    kind: str
    detail: str = ""


class Ordered(dict[Any, Any]):
    """An OrderedDict, which alone may carry a ``_metadata`` attribute."""


class Counted(dict[Any, Any]):
    """A Counter."""


def is_primitive(value: Any) -> bool:
    """Whether a value is a number, text, bytes or None."""
    return isinstance(value, _PRIMITIVE)


def torch_provides(path: str) -> bool:
    """Whether torch's own reader knows this name and a rule here covers it.

    Args:
        path: A dotted name from a file.
    """
    return path in RULES or path in STORAGES or path in _VALUES or _itemsize(path) is not None


def call(function: Global, args: Any) -> Any:
    """The stand-in for what the file makes by calling ``function``.

    Args:
        function: What it calls.
        args: The arguments, a tuple unless the file is forged.

    Raises:
        UnsafeFileError: If ordinary model files never make this call.
        UnreadableFileError: If the arguments make no sense.
    """
    if not isinstance(args, tuple):
        _nonsense(function)
    rule = RULES.get(function.path)
    if rule is not None:
        return rule(args)
    kind = function.allowed.kind if function.allowed else None
    if kind == "enum" and len(args) == 1 and is_primitive(args[0]):
        return Inert("enum")
    if kind == "partial" and len(args) == 1 and _is_allowed_global(args[0]):
        return Inert("partial", args[0].path)
    raise UnsafeFileError(
        f"the file calls {shown(function.path)} while it is read",
        "model files have no need to; do not trust it",
    )


def is_partial_state(made: Inert, state: Any) -> bool:
    """Whether ``state`` is what functools.partial stores, with plain arguments only.

    Args:
        made: The stand-in of the partial.
        state: What the file gives as its state.
    """
    if not (isinstance(state, tuple) and len(state) == 4):
        return False
    function, args, kwargs, attributes = state
    return (
        isinstance(function, Global)
        and function.path == made.detail
        and isinstance(args, tuple)
        and all(map(is_primitive, args))
        and _is_plain_dict(kwargs)
        and not attributes
    )


def is_dtype_state(state: Any) -> bool:
    """Whether ``state`` is what a plain NumPy dtype stores.

    Args:
        state: What the file gives as the dtype's state.
    """
    return (
        isinstance(state, tuple)
        and len(state) == 8
        and state[0] == 3
        and state[1] in ("<", ">", "|", "=")
        and state[2:] == (None, None, None, -1, -1, 0)
    )


def _tensor(args: tuple[Any, ...]) -> Array:
    if not (6 <= len(args) <= 7 and isinstance(args[0], Storage)):
        _nonsense("a tensor")
    _plain_hooks(args[5])
    _metadata(args[6:])
    return _view(args[0], args[1:4], args[0].itemsize)


def _bare_tensor(args: tuple[Any, ...]) -> Array:
    return _tensor((*args, False, None)) if len(args) == 4 else _nonsense("a tensor")


def _typed_tensor(args: tuple[Any, ...]) -> Array:
    if not (7 <= len(args) <= 8 and isinstance(args[0], Storage) and isinstance(args[6], Global)):
        _nonsense("a tensor")
    _plain_hooks(args[5])
    _metadata(args[7:])
    return _view(args[0], args[1:4], _itemsize(args[6].path) or 1)


def _quantized_tensor(args: tuple[Any, ...]) -> Array:
    if not (len(args) == 7 and isinstance(args[0], Storage) and isinstance(args[4], tuple)):
        _nonsense("a quantized tensor")
    if not all(is_primitive(value) or isinstance(value, Array | Global) for value in args[4]):
        _nonsense("a quantized tensor")
    _plain_hooks(args[6])
    return _view(args[0], args[1:4], args[0].itemsize)


def _view(storage: Storage, place: tuple[Any, ...], itemsize: int) -> Array:
    offset, size, stride = place
    if not (
        _is_natural(offset) and _is_shape(size) and _is_shape(stride) and len(size) == len(stride)
    ):
        _nonsense("a tensor")
    numel = math.prod(size)
    capacity = storage.numel * storage.itemsize // itemsize
    span = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if numel > capacity or (numel and offset + span > capacity):
        raise UnsafeFileError(
            f"a tensor asks for {numel:,} elements, but the file stores {capacity:,} for it",
            "save it again after calling .contiguous() on expanded tensors; from others, "
            "do not trust it",
        )
    return Array(numel, numel * itemsize)


def _sparse_tensor(args: tuple[Any, ...]) -> Array:
    parts = args[1] if len(args) == 2 else None
    if not (isinstance(parts, tuple) and 3 <= len(parts) <= 4):
        _nonsense("a sparse tensor")
    arrays = [part for part in parts if isinstance(part, Array)]
    shapes = [part for part in parts if _is_shape(part)]
    if not (len(arrays) >= 2 and len(shapes) == 1):
        _nonsense("a sparse tensor")
    if math.prod(shapes[0]) > _MOST_SPARSE_ELEMENTS:
        raise UnsafeFileError(
            f"a sparse tensor spans {math.prod(shapes[0]):,} elements",
            "save the model with dense tensors",
        )
    return Array(arrays[-1].numel, sum(array.nbytes for array in arrays))


def _parameter(args: tuple[Any, ...]) -> Array:
    if not (len(args) == 3 and isinstance(args[0], Array)):
        _nonsense("a parameter")
    _plain_hooks(args[2])
    return args[0]


def _parameter_with_state(args: tuple[Any, ...]) -> Array:
    if len(args) != 4:
        _nonsense("a parameter")
    _tensor_attributes(args[3])
    return _parameter(args[:3])


def _from_type(args: tuple[Any, ...]) -> Any:
    if not (len(args) == 4 and isinstance(args[0], Global) and isinstance(args[1], Global)):
        _nonsense("a tensor")
    if args[0].path not in _REBUILD or args[1].path not in _VALUES:
        raise UnsafeFileError(
            f"the file makes a tensor of the class {shown(args[1].path)}",
            "save the model with ordinary tensors",
        )
    _tensor_attributes(args[3])
    return call(args[0], args[2])


def _meta_tensor(args: tuple[Any, ...]) -> NoReturn:
    raise UnreadableFileError(
        "the model was saved from torch's meta device, so its weights are missing",
        "save it after the weights have been loaded",
    )


def _pickled_bytes(args: tuple[Any, ...]) -> NoReturn:
    raise UnreadableFileError(
        "it was written by pickle, not by torch.save",
        "save it again with torch.save(model.state_dict(), path)",
    )


def _ordered(args: tuple[Any, ...]) -> Ordered:
    return Ordered(_pairs(args, "an ordered dictionary"))


def _counter(args: tuple[Any, ...]) -> Counted:
    return Counted(_pairs(args, "a counter"))


def _pairs(args: tuple[Any, ...], what: str) -> dict[Any, Any]:
    if not args:
        return {}
    if len(args) == 1 and isinstance(args[0], dict):
        return dict(args[0])
    pairs = args[0] if len(args) == 1 and isinstance(args[0], list) else None
    if pairs is None or not all(_is_pair(pair) for pair in pairs):
        _nonsense(what)
    return dict(pairs)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and is_primitive(pair[0])


def _set(args: tuple[Any, ...]) -> Inert:
    if args and not (
        len(args) == 1 and isinstance(args[0], list | tuple) and all(map(is_primitive, args[0]))
    ):
        _nonsense("a set")
    return Inert("set")


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    if not (len(args) == 1 and _is_shape(args[0])):
        _nonsense("a size")
    return tuple(args[0])


def _small(kind: str, types: tuple[type, ...]) -> Callable[[tuple[Any, ...]], Inert]:
    def rule(args: tuple[Any, ...]) -> Inert:
        if not (args and all(isinstance(value, types) for value in args)):
            _nonsense(f"a {kind}")
        return Inert(kind)

    return rule


def _encode(args: tuple[Any, ...]) -> bytes:
    if not (len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1")):
        _nonsense("bytes")
    return args[0].encode("latin-1")


def _bytearray(args: tuple[Any, ...]) -> Inert:
    if args and isinstance(args[0], int):
        raise UnsafeFileError(
            f"the file asks for {args[0]:,} bytes of memory that it does not hold",
            "no model file does so; do not trust it",
        )
    if not all(isinstance(value, str | bytes) for value in args):
        _nonsense("a byte array")
    return Inert("bytearray")


def _numpy_dtype(args: tuple[Any, ...]) -> Inert:
    if not (args and isinstance(args[0], str) and args[0] in _SCALARS):
        raise UnsafeFileError(
            "the file holds a NumPy value that is not a plain number",
            "save numbers with float(value) or value.item()",
        )
    # Without a copy, the state that follows would change NumPy's own dtype.
    if args[1:] != (False, True):
        _nonsense("a NumPy dtype")
    return Inert("dtype", args[0])


def _numpy_scalar(args: tuple[Any, ...]) -> Inert:
    if not (
        len(args) == 2
        and isinstance(args[0], Inert)
        and args[0].kind == "dtype"
        and isinstance(args[1], bytes)
        and len(args[1]) == int(args[0].detail[1:])
    ):
        _nonsense("a NumPy scalar")
    return Inert("numpy scalar", args[0].detail)


_REBUILD: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor": _bare_tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_qtensor": _quantized_tensor,
    "torch._utils._rebuild_sparse_tensor": _sparse_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter_with_state,
}

RULES: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    **_REBUILD,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta_tensor,
    "torch.storage._load_from_bytes": _pickled_bytes,
    "torch.serialization._get_layout": _small("layout", (str,)),
    "torch.Size": _size,
    "torch.device": _small("device", (str, int)),
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.complex": _small("complex number", (int, float)),
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
"""Every function that a file may call, with the rule for its arguments."""


def _itemsize(path: str) -> int | None:
    prefix, _, name = path.partition(".")
    dtype = getattr(torch, name, None) if prefix == "torch" and "." not in name else None
    return dtype.itemsize if isinstance(dtype, torch.dtype) else None


def _plain_hooks(hooks: Any) -> None:
    if hooks:
        raise UnsafeFileError(
            "a tensor in the file carries hooks, which are code",
            "save the model without hooks",
        )


def _metadata(rest: Sequence[Any]) -> None:
    flags = rest[0] if rest else None
    if flags and not (_is_plain_dict(flags) and set(flags) <= {"conj", "neg"}):
        _nonsense("a tensor")


def _tensor_attributes(state: Any) -> None:
    if not state:
        return
    if not _is_plain_dict(state) or any(hasattr(torch.nn.Parameter, key) for key in state):
        raise UnsafeFileError(
            "a tensor in the file carries attributes that tdkit does not trust",
            "save the model's state_dict with ordinary tensors",
        )


def _is_plain_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and is_primitive(entry) for key, entry in value.items()
    )


def _is_allowed_global(value: Any) -> bool:
    return isinstance(value, Global) and value.allowed is not None


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) <= 64 and all(map(_is_natural, value))


def _nonsense(what: object) -> NoReturn:
    raise UnreadableFileError(
        f"the file is damaged or forged: it describes {shown(what)} with arguments that make no "
        "sense",
        "copy or download it again",
    )
