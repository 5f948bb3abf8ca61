"""How much memory a compression takes above the model.

    python benchmarks/memory.py [--quick] [--model NAME]

Each row is a process of its own: it makes or reads the model, forgets the peak so far, compresses,
and says how far the peak then rose above what it held before. The work of the largest decomposed
layer alone, factorized by the same methods to the same keeps, is measured in the same way and taken
off; it holds no copy of the layer, so that a copy counts as the compression's. What remains is
compared with the size of the model. glibc is told to give back at once what is freed, so that the
peak is what is held and not what is kept for later.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from common import MIB, demand, header, options, row, run_child

WAYS = ("a copy", "in place", "from a file", "from a file, timed")
MODELS = ("embedding", "head", "resnet50")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)
    parser = options(__doc__)
    parser.add_argument("--model", choices=MODELS, help="only this one")
    given = parser.parse_args()
    quick = given.quick
    print("MiB above the model, one run each.\n")
    header(
        "model", "MiB", "way", "peak", "largest layer alone", "the rest", "asked", "of the model"
    )
    for name in [given.model] if given.model else MODELS:
        alone = measure(name, "layer", quick)
        for way in WAYS:
            found = measure(name, way, quick)
            size, rest = found["size"], max(0, found["peak"] - alone["peak"])
            asked = "1.25" if way == "a copy" else "0.25" if "timed" not in way else "–"
            numbers = [
                f"{value / MIB:,.0f}" for value in (size, found["peak"], alone["peak"], rest)
            ]
            row(name, numbers[0], way, *numbers[1:], asked, f"{rest / size:.2f}")


def measure(name: str, way: str, quick: bool) -> dict[str, int]:
    """Run one way in a process of its own."""
    command = [sys.executable, __file__, "--child", name, way, str(int(quick))]
    usage = demand(run_child(command, limit=550), f"{name}, {way}")
    found: dict[str, int] = json.loads(usage.output.splitlines()[-1])
    return found


def child(name: str, way: str, quick: str) -> dict[str, int]:
    """Compress, and measure the peak above what was held before."""
    import tdkit
    from tdkit.registry import load_registry

    load_registry()
    small = bool(int(quick))
    warm(name, small)
    if way == "layer":
        layer, methods = largest(name, small), arguments(name)["methods"]
        before = held()
        for method, keep in product(methods, KEEPS):
            # Not tdkit.score, which copies what it is given: that would be taken off as well.
            tdkit.factorize(layer, method, keep=keep)
        return {"size": bytes_of(layer), "peak": peak() - before}
    model = create(name, small)
    size, subject = bytes_of(model), model
    with tempfile.TemporaryDirectory() as folder:
        if way.startswith("from a file"):
            path = Path(folder) / "model.pt"
            tdkit.save(model, path)
            del model
            subject, size_of_file = path, size
            # What the file's model takes is the model itself, and not above it.
            before = held() + size_of_file
        else:
            before = held()
        tdkit.compress(
            subject,
            **arguments(name),
            keeps=KEEPS,
            inplace=way == "in place",
            measure=way not in ("in place", "from a file"),
            batch_size=2,
        )
        return {"size": size, "peak": peak() - before}


KEEPS = (0.1, 0.25, 0.5)


def arguments(name: str) -> dict[str, Any]:
    """What is compressed, to what."""
    import torch

    if name != "resnet50":
        tokens = torch.arange(8)[None].repeat(2, 1)
        # One layer of less than a hundredth of the model: what remains is dense.
        return {
            "budget": 0.999,
            "layers": ["2"],
            "methods": ["svd"],
            "example_inputs": (tokens,),
        }
    return {"budget": 0.5, "methods": ["svd", "tucker"], "input_shape": (3, 64, 64)}


def create(name: str, small: bool) -> Any:
    """The model: 2 GB of bfloat16, nearly all of it a table, or a table and a head of its size.

    Or torchvision's ResNet-50.
    """
    import torch
    import torchvision
    from torch import nn

    torch.manual_seed(0)
    if name == "resnet50":
        return torchvision.models.resnet50(weights=None).eval()
    rows, width = (60_000, 2048) if small else (500_000, 2048)
    if name == "head":
        rows //= 2
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(rows, width), nn.Linear(width, width), nn.Linear(width, width),
            nn.Linear(width, 8 if name == "embedding" else rows, bias=False),
        )  # fmt: skip
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def largest(name: str, small: bool) -> Any:
    """The largest layer of a model that is decomposed, alone."""
    from torch import nn

    model = create(name, small)
    names = arguments(name).get("layers")
    layers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and (names is None or path in names)
    ]
    return max(layers, key=lambda layer: layer.weight.numel())


def warm(name: str, small: bool) -> None:
    """Load what torch loads when it first decomposes and convolves, on something tiny."""
    from torch import nn

    import tdkit

    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    tdkit.compress(tiny, 0.9, methods=["svd", "tucker"], input_shape=(3, 12, 12))


def bytes_of(model: Any) -> int:
    """Of parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held() -> int:
    """Resident memory now, from where the peak counts anew."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """The most resident memory since :func:`held`."""
    return status("VmHWM")


def status(key: str) -> int:
    """A row of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
