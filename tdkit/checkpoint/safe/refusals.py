"""What to say of a file that names something outside the list of allowed classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from tdkit.checkpoint.text import listed, shown
from tdkit.errors import UnsafeFileError, option

if TYPE_CHECKING:
    from collections.abc import Mapping

_DANGEROUS_NAMES = """
    builtins os posix nt sys subprocess shutil socket runpy importlib pickle code codeop pty
    webbrowser ctypes platform pydoc pdb timeit bdb commands multiprocessing asyncio urllib http
    requests pip marshal operator _operator functools
"""
_DANGEROUS = frozenset(_DANGEROUS_NAMES.split())
_HARMLESS = frozenset(
    f"builtins.{name}"
    for name in ("dict", "frozenset", "list", "object", "range", "slice", "tuple")
)
_ADVICE = (
    ("torch._dynamo.", "it was saved through torch.compile: save model._orig_mod instead"),
    ("torch.nn.parallel.distributed.", "it was saved while distributed: save model.module instead"),
    ("torch.nn.utils.weight_norm.", "call torch.nn.utils.remove_weight_norm before saving"),
    ("torch.nn.utils.spectral_norm.", "call torch.nn.utils.remove_spectral_norm before saving"),
    ("torch.nn.utils.prune.", "call torch.nn.utils.prune.remove before saving"),
    (".Lazy", "run the model once before saving, so that its lazy layers get their shapes"),
    (".quantized.", "save the model as it was before quantizing"),
)


# Enough for the classes of any model; a hostile file may name any number.
_MOST = 50


def refuse_unlisted(source: object, unlisted: Mapping[str, str]) -> NoReturn:
    """Refuse a file for the names it uses.

    Args:
        source: The file.
        unlisted: Dotted names, each with its module.

    Raises:
        UnsafeFileError: Always.
    """
    advice = next(
        (advice for part, advice in _ADVICE if any(part in path for path in unlisted)), None
    )
    dangerous = [path for path, module in unlisted.items() if _is_dangerous(path, module)]
    if dangerous:
        raise UnsafeFileError(
            f"{source} uses {listed(dangerous)}: reading it could run code, so tdkit does not",
            advice or "do not trust it; ask its author for a state_dict or a safetensors file",
        )
    raise UnsafeFileError(
        f"{source} uses {listed(unlisted)}: not on tdkit's list of classes that a file may hold",
        advice or _how_to_allow(unlisted),
    )


def _is_dangerous(path: str, module: str) -> bool:
    return module.partition(".")[0] in _DANGEROUS and path not in _HARMLESS


def _how_to_allow(unlisted: Mapping[str, str]) -> str:
    own = option("arch", "package.module:Class")
    alone = f"save the state_dict alone, and name its class with {own}"
    classes = [
        f"{_module(module)}:{shown(path[len(module) + 1 :])}"
        for path, module in unlisted.items()
        if path[len(module) + 1 :].lstrip("_")[:1].isupper()
    ]
    if not classes:
        return alone
    allowing = option("allow_classes", classes[:_MOST])
    return f"if the file and this code are yours: {allowing}; or {alone}"


def _module(name: str) -> str:
    """A module's name; that of the script itself only its author knows."""
    return "YOUR_MODULE" if name == "__main__" else shown(name)
