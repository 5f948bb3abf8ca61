"""How close to the machine the CP sweep and the HOSVD come, where the rest goes, and start-up.

    python benchmarks/machine.py [--repeats 5]

The peak is the best of several products of square matrices, with the same number of threads. The
operations counted are those that cannot be avoided: in a CP sweep the two products with the whole
tensor, in the HOSVD both Gram matrices and the core.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from common import (
    demand,
    header,
    median_seconds,
    options,
    plural,
    row,
    run_child,
    show_profile,
    threads,
    timed,
)
from torch import Tensor, nn

from tdkit.compression.scoring import PAPER_KEEPS
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.hosvd import Hosvd, hosvd, project
from tdkit.decompositions.tucker import Tucker
from tdkit.layers.spec import LayerSpec, spec_of

KEEP = 0.1
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Work:
    """A piece of work, how many multiplications and additions it needs, and what it takes."""

    name: str
    operations: float
    seconds: float


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    repeats = 2 if given.quick else given.repeats
    channels = 64 if given.quick else 512
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, bias=False)
    print(
        f"A {channels}×{channels}×3×3 convolution, {threads()}, medians of"
        f" {plural(repeats, 'run')}. Shares are of `torch.matmul`'s peak in either precision."
        " Asked: what is left to gain is at most 2×, that is a share of 50 %. The HOSVD's two"
        " eigendecompositions are LAPACK's and count as no operations; what tdkit can choose are"
        " its products, so they are measured alone too.\n"
    )
    show_shares(conv, (256, 512) if given.quick else (1024, 2048), repeats)
    show_profiles(conv)
    show_precisions(conv, repeats)
    show_start(3 if given.quick else 7)


def show_shares(conv: nn.Conv2d, sizes: Sequence[int], repeats: int) -> None:
    peaks = {name: peak(dtype, sizes) for name, dtype in DTYPES.items()}
    header("", "G operations", "s", "G operations/s", *(f"share of {name}" for name in DTYPES))
    for name, rate in peaks.items():
        row(f"`matmul`, {name}", "", "", f"{rate / 1e9:.1f}", "", "")
    whole, products = higher_order_svd(conv, repeats), hosvd_products(conv, repeats)
    for work in (sweep(conv, repeats), whole, products):
        rate = work.operations / work.seconds
        shares = [f"{100 * rate / top:.0f} %" for top in peaks.values()]
        row(
            work.name, f"{work.operations / 1e9:.2f}", f"{work.seconds:.3f}", f"{rate / 1e9:.1f}",
            *shares,
        )  # fmt: skip


def peak(dtype: torch.dtype, sizes: Sequence[int]) -> float:
    """The most operations per second of a square product, two per multiply-accumulate."""
    best = 0.0
    for n in sizes:
        left, right = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
        seconds = min(timed(lambda a=left, b=right: a @ b)[0] for _ in range(6))
        best = max(best, 2 * n**3 / seconds)
    return best


def sweep(conv: nn.Conv2d, repeats: int) -> Work:
    """One sweep: the difference between a few sweeps and one, without what both have around."""
    rank = Cp().rank(spec_of(conv), KEEP)
    long, short = (median_seconds(als(conv, sweeps), repeats) for sweeps in (6, 1))
    operations = 2 * 2 * conv.weight.numel() * rank
    return Work(f"a CP sweep, rank {rank}", operations, (long - short) / 5)


def als(conv: nn.Conv2d, sweeps: int) -> Callable[[], object]:
    method = Cp(sweeps=sweeps, tolerance=-math.inf, start="uniform")
    prepared = method.prepare(spec_of(conv), conv.weight.detach())
    rank = method.rank(spec_of(conv), KEEP)
    return lambda: prepared.group_factors(rank)


def higher_order_svd(conv: nn.Conv2d, repeats: int) -> Work:
    layer, weight = spec_of(conv), conv.weight.detach()
    seconds = median_seconds(lambda: Tucker().prepare(layer, weight), repeats)
    return Work("HOSVD (`Tucker.prepare`)", hosvd_operations(layer), seconds)


def hosvd_products(conv: nn.Conv2d, repeats: int) -> Work:
    """What is counted of it, alone: the rest are eigendecompositions, norms and checks."""
    cube = conv.weight.detach().double().flatten(2)[None]
    found = hosvd(cube)

    def work() -> None:
        for rows in (cube.flatten(2), cube.transpose(1, 2).flatten(2)):
            rows @ rows.mT
        project(cube, found.basis_out, found.basis_in)

    seconds = median_seconds(work, repeats)
    return Work("its products alone", hosvd_operations(spec_of(conv)), seconds)


def hosvd_operations(layer: LayerSpec) -> float:
    """Two Gram matrices, and the weight in both bases; without the eigendecompositions."""
    out, channels, kernel = layer.out_channels, layer.in_channels, math.prod(layer.kernel_size)
    size = out * channels * kernel
    return 2.0 * size * (out + channels) + 2.0 * size * (out + channels)


def show_profiles(conv: nn.Conv2d) -> None:
    layer, weight = spec_of(conv), conv.weight.detach()
    show_profile("5 CP sweeps", als(conv, 5))
    show_profile("the HOSVD", lambda: Tucker().prepare(layer, weight))


def show_precisions(conv: nn.Conv2d, repeats: int) -> None:
    """What the HOSVD in float32 would gain and lose, on weights whose energies fall differently."""
    print("\n### The HOSVD in float32\n")
    print(
        "Channel energies fall like n^(-2p) in both modes; p = 0 is noise. The truth is the norm of"
        " what the factors leave out, in float64; errors are relative to the norm of the weight."
        " Bases from float32 mix the small directions, so a truncation that should leave little"
        " leaves too much: tdkit stays in float64.\n"
    )
    header(
        "p", "precision", "s", *(f"error at keep {keep}" for keep in PAPER_KEEPS),
        "largest deviation from the truth",
    )  # fmt: skip
    layer = spec_of(conv)
    ranks = [Tucker().rank(layer, keep) for keep in PAPER_KEEPS]
    for power in (0.0, 0.5, 1.0, 2.0):
        weight = decaying(conv.weight.detach().double(), power)
        for name, dtype in DTYPES.items():
            cast = weight.to(dtype)[None]
            seconds = median_seconds(lambda cast=cast: hosvd(cast), repeats)
            found = hosvd(cast)
            true = [left_out(weight, found, rank) for rank in ranks]
            told = [math.sqrt(max(0.0, float(found.squared[rank]))) for rank in ranks]
            deviation = max(abs(t / e - 1) for t, e in zip(told, true, strict=True))
            row(
                f"{power:g}", name, f"{seconds:.3f}", *(f"{error:.3g}" for error in true),
                f"{deviation:.0e}",
            )  # fmt: skip


def decaying(noise: Tensor, power: float) -> Tensor:
    """A weight of norm 1 whose channels in some basis have energies that fall."""
    out, channels = noise.shape[:2]
    left, right = (torch.linalg.qr(torch.randn(n, n).double()).Q for n in (out, channels))
    scale_out, scale_in = (torch.arange(1, n + 1).double() ** -power for n in (out, channels))
    core = noise * scale_out[:, None, None, None] * scale_in[None, :, None, None]
    weight = torch.einsum("rsab,or,is->oiab", core, left, right)
    return weight / weight.norm()


def left_out(weight: Tensor, found: Hosvd, rank: tuple[int, int]) -> float:
    """The norm of a weight less its truncated HOSVD."""
    r_out, r_in = rank
    core = found.core[0, :r_out, :r_in].double()
    bases = found.basis_out[0, :, :r_out].double(), found.basis_in[0, :, :r_in].double()
    return float((weight - torch.einsum("rsab,or,is->oiab", core, *bases)).norm())


def show_start(repeats: int) -> None:
    print("\n### Start-up\n")
    print(
        f"Medians of {repeats} child processes; the first, which may read from the disk, is left"
        " out.\n"
    )
    commands = {
        'python -c "import torch"': [sys.executable, "-c", "import torch"],
        "tdkit --help": [*tdkit(), "--help"],
        "tdkit inspect garipov": [*tdkit(), "inspect", "garipov"],
    }
    asked = {
        "tdkit --help": "under 0.4 s",
        "tdkit inspect garipov": "dominated by importing torch",
    }
    found = {name: start(command, name, repeats) for name, command in commands.items()}
    reference = next(iter(found.values()))[0]
    header("command", "wall, s", "processor, s", "of importing torch", "asked")
    for name, (wall, cpu) in found.items():
        share = f"{wall / reference:.2f}×"
        row(f"`{name}`", f"{wall:.2f}", f"{cpu:.2f}", share, asked.get(name, ""))


def start(command: Sequence[str], name: str, repeats: int) -> tuple[float, float]:
    usages = [demand(run_child(command), name) for _ in range(repeats + 1)][1:]
    return median(u.seconds for u in usages), median(u.cpu_seconds for u in usages)


def tdkit() -> list[str]:
    """The installed command, as a user starts it."""
    script = Path(sys.executable).with_name("tdkit")
    return [str(script)] if script.exists() else [sys.executable, "-m", "tdkit"]


if __name__ == "__main__":
    main()
