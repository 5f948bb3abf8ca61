"""CP by ALS: tensorly's parafac against tdkit's, same sweeps, same start, no early stopping.

    python benchmarks/cp.py [--sweeps 50]

Both begin with the very same uniform [0, 1) factors, drawn from one seeded generator, and neither
stops early. tensorly works in float32, as it would from a layer's weight; tdkit in float64 inside.
Both errors are those of the returned factors, in float64. The inputs are normal noise, which is
what a layer is before training, and noise whose channels decay as those of a trained layer do.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

import tensorly
import torch
from common import header, options, plural, ratio, row, threads, timed
from tensorly.decomposition import parafac
from torch import Tensor

from tdkit.decompositions.cp import Cp
from tdkit.layers.spec import LayerSpec

SEEDS = range(5)
LONG = 500


@dataclass(frozen=True)
class Result:
    """Seconds, relative error, and the largest component relative to the tensor."""

    seconds: float
    error: float
    component: float


@dataclass(frozen=True)
class Comparison:
    """A tensor, its rank, and what is asked of it."""

    channels: int
    keep: float
    asked: str
    seeds: Sequence[int]
    kinds: Sequence[str] = ("noise",)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a square convolution with 3 × 3 kernels."""
        return (self.channels, self.channels, 3, 3)

    @property
    def rank(self) -> int:
        """The proportional rank."""
        return Cp().rank(spec(self.shape), self.keep)

    @property
    def name(self) -> str:
        """Shape and keep."""
        return f"{'×'.join(map(str, self.shape))}, keep {self.keep}"


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--sweeps", type=int, default=50)
    given = parser.parse_args()
    tensorly.set_backend("pytorch")
    sweeps = 3 if given.quick else given.sweeps
    print(
        f"tensorly's `parafac` and tdkit's ALS, {plural(sweeps, 'sweep')} each, from the same"
        f" uniform [0, 1) factors, without early stopping; {threads()}."
        f" Seconds are medians over {len(SEEDS)} seeds and errors, relative to ‖W‖, their means.\n"
    )
    run(1, noise((16, 16, 3, 3), 0), 4, 0)  # the first call loads code
    show_speed(given, sweeps)
    show_stability(sweeps if given.quick else LONG)


def show_speed(given: argparse.Namespace, sweeps: int) -> None:
    header(
        "tensor", "rank", "input", "tensorly, s", "tdkit, s", "ratio", "asked",
        "tensorly's error", "tdkit's error", "above", "asked",
    )  # fmt: skip
    for case in comparisons(given.quick):
        for kind in case.kinds:
            compare(case, kind, KINDS[kind], sweeps)


def comparisons(quick: bool) -> list[Comparison]:
    if quick:
        return [Comparison(32, 0.5, "5×", (0, 1)), Comparison(64, 0.1, "50×", (0, 1))]
    # The large one takes tensorly more than a minute for each seed.
    return [Comparison(128, 0.5, "5×", SEEDS, tuple(KINDS)), Comparison(512, 0.1, "50×", SEEDS)]


def compare(
    case: Comparison, kind: str, make: Callable[[tuple[int, ...], int], Tensor], sweeps: int
) -> None:
    theirs, ours = [], []
    for seed in case.seeds:
        tensor = make(case.shape, seed)
        theirs.append(run_theirs(sweeps, tensor, case.rank, seed))
        ours.append(run(sweeps, tensor, case.rank, seed))
    seconds = [median(result.seconds for result in results) for results in (theirs, ours)]
    errors = [mean(result.error for result in results) for results in (theirs, ours)]
    row(
        case.name, case.rank, kind, f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", ratio(*seconds),
        case.asked, f"{errors[0]:.4f}", f"{errors[1]:.4f}",
        f"{100 * (errors[1] / errors[0] - 1):+.2f} %", "at most +0.5 %",
    )  # fmt: skip


def run(sweeps: int, tensor: Tensor, rank: int, seed: int) -> Result:
    """The ALS of tdkit, which draws its start from a generator of this seed, mode by mode."""
    method = Cp(sweeps=sweeps, tolerance=-math.inf, start="uniform")
    layer = spec(tuple(tensor.shape))
    seconds, stages = timed(lambda: method.prepare(layer, tensor, seed).factors(rank))
    return judged(seconds, tensor, columns(stages))


def run_theirs(sweeps: int, tensor: Tensor, rank: int, seed: int) -> Result:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.rand(n, rank, dtype=torch.float64, generator=generator) for n in tensor.shape]
    first = (torch.ones(rank), [factor.float() for factor in start])
    seconds, (weights, factors) = timed(
        lambda: parafac(tensor, rank, n_iter_max=sweeps, init=first, tol=0)
    )
    return judged(seconds, tensor, [factors[0] * weights, *factors[1:]])


def columns(stages: Sequence[Tensor]) -> list[Tensor]:
    """The factors (mode size, rank) of out, in, height and width from the stages' weights."""
    first, down, across, last = stages
    return [last.flatten(1), first.flatten(1).T, down.flatten(1).T, across.flatten(1).T]


def judged(seconds: float, tensor: Tensor, factors: Sequence[Tensor]) -> Result:
    wide = [factor.double() for factor in factors]
    norm = float(torch.linalg.vector_norm(tensor.double()))
    out, *others = wide
    rest = torch.einsum("cr,yr,xr->rcyx", *others).flatten(1)
    error = float(torch.linalg.vector_norm(tensor.double().flatten(1) - out @ rest)) / norm
    sizes = torch.stack([torch.linalg.vector_norm(factor, dim=0) for factor in wide]).prod(0)
    return Result(seconds, error, float(sizes.max()) / norm)


def spec(shape: tuple[int, ...]) -> LayerSpec:
    out, channels, *kernel = shape
    return LayerSpec("Conv2d", channels, out, tuple(kernel), (1, 1), (1, 1), (1, 1))


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def decaying(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise whose directions have variances that fall as 1 / n over both channel modes."""
    tensor = noise(shape, seed)
    for mode in (0, 1):
        n = shape[mode]
        mixing = torch.linalg.qr(noise((n, n), 100 + seed + mode))[0]
        mixing = mixing * torch.arange(1, n + 1).rsqrt()
        tensor = torch.tensordot(mixing, tensor.movedim(mode, 0), 1).movedim(0, mode)
    return tensor.contiguous()


KINDS: Mapping[str, Callable[[tuple[int, ...], int], Tensor]] = {
    "noise": noise,
    "decaying": decaying,
}


def show_stability(sweeps: int) -> None:
    """Inputs on which ALS is known to break, through :meth:`Cp.prepare`, in float32."""
    print("\n### Stability\n")
    print(
        f"{plural(sweeps, 'sweep')} on hard inputs of 32×24×3×3, in float32. A component is the"
        " product of the norms of one column of every factor, relative to ‖W‖: where it grows with"
        " the sweeps, large terms cancel. Asked of tdkit: no NaN and no such growth.\n"
    )
    header(
        "input", "rank", "tdkit: NaN", f"error after {sweeps // 10 or 1}", f"after {sweeps}",
        f"largest component after {sweeps // 10 or 1}", f"after {sweeps}",
        "tensorly: NaN", "error", "largest component",
    )  # fmt: skip
    for name, (tensor, rank) in hard_inputs().items():
        early, late = (prepared(count, tensor, rank) for count in (sweeps // 10 or 1, sweeps))
        row(
            name, rank, said(early, late), f"{early.error:.2g}", f"{late.error:.2g}",
            f"{early.component:.2g}", f"{late.component:.2g}", *their_cells(sweeps, tensor, rank),
        )  # fmt: skip


def their_cells(sweeps: int, tensor: Tensor, rank: int) -> list[str]:
    try:
        theirs = run_theirs(sweeps, tensor, rank, 0)
    except RuntimeError as error:  # a singular matrix
        return [f"fails: {str(error).splitlines()[0]}", "", ""]
    return [said(theirs), f"{theirs.error:.2g}", f"{theirs.component:.2g}"]


def said(*results: Result) -> str:
    numbers = [number for result in results for number in (result.error, result.component)]
    return "no" if all(map(math.isfinite, numbers)) else "yes"


def prepared(sweeps: int, tensor: Tensor, rank: int) -> Result:
    method = Cp(sweeps=sweeps, tolerance=-math.inf, start="uniform")
    layer = method.prepare(spec(tuple(tensor.shape)), tensor)
    seconds, stages = timed(lambda: layer.factors(rank))
    return judged(seconds, tensor, columns(stages))


def hard_inputs() -> dict[str, tuple[Tensor, int]]:
    """Tensors and ranks by name."""
    shape = (32, 24, 3, 3)
    plain = noise(shape, 0)
    return {
        "noise": (plain, 20),
        "noise × 1e-20": (plain * 1e-20, 20),
        "noise × 1e20": (plain * 1e20, 20),
        "of rank 4": (kruskal([noise((n, 4), n) for n in shape]), 20),
        "of rank 4, × 1e-20": (kruskal([noise((n, 4), n) for n in shape]) * 1e-20, 20),
        "near-collinear columns (1e-4)": (kruskal(collinear(shape, 8, 1e-4)), 8),
        "near-collinear columns (1e-4), rank above": (kruskal(collinear(shape, 8, 1e-4)), 20),
        "border rank 2": (border(shape), 2),
        "a constant": (torch.ones(shape), 5),
        "all zero but one entry": (single(shape), 5),
    }


def kruskal(factors: Sequence[Tensor]) -> Tensor:
    return torch.einsum("or,cr,yr,xr->ocyx", *factors)


def collinear(shape: Sequence[int], rank: int, distance: float) -> list[Tensor]:
    return [noise((n, 1), n) + distance * noise((n, rank), 50 + n) for n in shape]


def border(shape: Sequence[int]) -> Tensor:
    """Of rank 4, yet as near as one likes to tensors of rank 2, whose components then diverge."""
    plain = [torch.nn.functional.normalize(noise((n, 1), n), dim=0) for n in shape]
    other = [torch.nn.functional.normalize(noise((n, 1), 50 + n), dim=0) for n in shape]
    swapped = [[o if i == mode else p for i, (p, o) in enumerate(zip(plain, other, strict=True))]
               for mode in range(len(shape))]  # fmt: skip
    return torch.stack([kruskal(factors) for factors in swapped]).sum(0)


def single(shape: tuple[int, ...]) -> Tensor:
    tensor = torch.zeros(shape)
    tensor[3, 5, 1, 2] = 1
    return tensor


if __name__ == "__main__":
    main()
