"""Read models from files that nobody vouches for, and write them so that nothing is lost."""

from tdkit.checkpoint.reading import LoadedModel, content_hash, load_into, load_model
from tdkit.checkpoint.writing import FORMATS, default_format, save_model
from tdkit.files import atomic_write, check_writable

__all__ = [
    "FORMATS",
    "LoadedModel",
    "atomic_write",
    "check_writable",
    "content_hash",
    "default_format",
    "load_into",
    "load_model",
    "save_model",
]
