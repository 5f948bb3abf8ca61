"""The laws of every registered decomposition; a plugin is tested the moment it is installed."""

from tdkit.registry import load_registry
from tdkit.testing import DecompositionLaws

for _name, _record in load_registry().decompositions.items():
    _class = f"Test{_name.title().replace('-', '')}"
    globals()[_class] = type(_class, (DecompositionLaws,), {"method": _record.create()})

del DecompositionLaws
