"""The laws of all that is registered; a plugin is tested the moment it is installed."""

from tdkit.layers.chains import OWN_STAGES
from tdkit.registry import load_registry
from tdkit.testing import DecompositionLaws, StageLaws, stage_cases

for _name, _record in load_registry().decompositions.items():
    _class = f"Test{_name.title().replace('-', '')}"
    globals()[_class] = type(_class, (DecompositionLaws,), {"method": _record.create()})

for _kind in OWN_STAGES:
    globals()[f"Test{_kind}Stage"] = type(
        f"Test{_kind}Stage", (StageLaws,), {"cases": stage_cases(_kind)}
    )

del DecompositionLaws, StageLaws
