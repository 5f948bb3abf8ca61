"""Errors of all candidates: tdkit prepares a layer once, tensorly-torch decomposes each candidate.

    python benchmarks/scoring.py [--repeats 3]

The candidates are the paper's: eight layers of ResNet-18 under Tucker and TT at five keeps, with
proportional ranks, the same on both sides. tensorly-torch scores as the paper's code does:
``FactorizedConv.from_conv`` per candidate and the error from ``weight.to_tensor()``. The weights
are random (seeded), so all ranks are far from exact and no side profits from a low rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import tensorly
import torch
from common import header, options, plural, ratio, row, threads, timed
from measuring import LAYERS, opened
from tltorch import FactorizedConv
from torch import Tensor, nn

from tdkit.compression.scoring import PAPER_KEEPS
from tdkit.decompositions.base import Decomposition, Rank
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.layers.spec import spec_of

MODEL = "resnet18-cifar"
METHODS: Mapping[str, Decomposition] = {"tucker": Tucker(), "tt": TensorTrain()}
SWEEPS = (1, 2, 3)
# A way of scoring that has taken so many seconds is not repeated.
ENOUGH = 60.0
THEIRS, FACTORS, REFINED = "theirs", "with factors", "refined"


@dataclass(frozen=True)
class Case:
    """One layer under one method, at the ranks that both sides take."""

    layer: str
    method: str
    conv: nn.Conv2d
    ranks: tuple[Rank, ...]


@dataclass(frozen=True)
class Measured:
    """Seconds for all cases of a method, a median over so many runs, and every error."""

    seconds: float
    runs: int
    errors: tuple[float, ...]


Way = Callable[[Case], list[float]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tensorly.set_backend("pytorch")
    names = LAYERS[MODEL][:2] if given.quick else LAYERS[MODEL]
    repeats = 1 if given.quick else given.repeats
    model, _ = opened(MODEL)
    seconds, cases = timed(lambda: all_cases(model, names))
    count = sum(len(case.ranks) for case in cases)
    print(
        f"{plural(len(names), 'layer')} of {MODEL} with random weights × {', '.join(METHODS)} ×"
        f" {len(PAPER_KEEPS)} keeps: {plural(count, 'candidate')}, the same proportional ranks on"
        f" both sides (finding them took {seconds:.2f} s and is not counted)."
        f" Medians of up to {plural(repeats, 'run')} in turn, {threads()}."
    )
    warm_up(cases[0])
    measured = {name: compared(method_cases(cases, name), repeats) for name in METHODS}
    show_totals(measured)
    show_refined(measured["tucker"])
    show_truth(cases)


def all_cases(model: nn.Module, names: Sequence[str]) -> list[Case]:
    found = []
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        for label, method in METHODS.items():
            ranks = tuple(method.rank(spec_of(conv), keep) for keep in PAPER_KEEPS)
            found.append(Case(name, label, conv, ranks))
    return found


def method_cases(cases: Sequence[Case], method: str) -> list[Case]:
    return [case for case in cases if case.method == method]


def warm_up(case: Case) -> None:
    """The first call of a library loads code that the others have at hand."""
    ours(case)
    theirs(Case(case.layer, case.method, case.conv, case.ranks[:1]))


def compared(cases: Sequence[Case], repeats: int) -> dict[str, Measured]:
    """Every way of scoring on the cases of one method, in turn."""
    ways = ways_of(cases[0].method)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    errors: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            if sum(seconds[name]) > ENOUGH:
                continue
            taken, errors[name] = timed(lambda way=way: [e for case in cases for e in way(case)])
            seconds[name].append(taken)
    return {
        name: Measured(median(taken), len(taken), tuple(errors[name]))
        for name, taken in seconds.items()
    }


def ways_of(method: str) -> dict[str, Way]:
    ways: dict[str, Way] = {THEIRS: theirs, "errors": ours, FACTORS: ours_with_factors}
    if method == "tucker":
        for sweeps in SWEEPS:
            hooi = Tucker(sweeps=sweeps)
            ways[plural(sweeps, "sweep")] = lambda case, hooi=hooi: ours_with_factors(case, hooi)
        ways[REFINED] = ours_refined
    return ways


@torch.no_grad()
def theirs(case: Case) -> list[float]:
    """One decomposition per candidate."""
    weight = case.conv.weight.detach()
    found = []
    for rank in case.ranks:
        built = FactorizedConv.from_conv(
            case.conv, rank=their_rank(case, rank), factorization=case.method
        )
        if tuple(built.weight.rank) != their_rank(case, rank):
            raise SystemExit(f"{case.layer}: another rank than asked for, {built.weight.rank}")
        rebuilt = built.weight.to_tensor()
        rebuilt = rebuilt.movedim(-1, 0) if case.method == "tt" else rebuilt
        found.append(float(torch.linalg.vector_norm(weight - rebuilt)))
    return found


def their_rank(case: Case, rank: Rank) -> tuple[int, ...]:
    """An explicit rank: a fraction would give them other sizes."""
    assert isinstance(rank, tuple)
    return (*rank, *case.conv.kernel_size) if case.method == "tucker" else (1, *rank, 1)


def ours(case: Case) -> list[float]:
    """One preparation, and the error of every rank."""
    prepared = METHODS[case.method].prepare(spec_of(case.conv), case.conv.weight.detach())
    return [prepared.error(rank) for rank in case.ranks]


def ours_with_factors(case: Case, method: Decomposition | None = None) -> list[float]:
    """The same, and the factors of every rank, which tensorly-torch has at the end too."""
    chosen = method or METHODS[case.method]
    prepared = chosen.prepare(spec_of(case.conv), case.conv.weight.detach())
    found = []
    for rank in case.ranks:
        found.append(prepared.error(rank))
        prepared.factors(rank)
    return found


def ours_refined(case: Case) -> list[float]:
    """One preparation, and every rank refined by HOOI until it settles, with its factors."""
    prepared = METHODS[case.method].prepare(spec_of(case.conv), case.conv.weight.detach())
    found = []
    for rank in case.ranks:
        refined = prepared.refined(rank)
        found.append(refined.error(rank))
        refined.factors(rank)
    return found


def show_totals(measured: Mapping[str, Mapping[str, Measured]]) -> None:
    print("\n### HOSVD and TT-SVD: all errors\n")
    header(
        "method", "tensorly-torch, s", "tdkit: errors, s", "ratio", "asked",
        "errors and factors, s", "ratio", "error above theirs, mean / most",
    )  # fmt: skip
    for name, found in measured.items():
        above = excess(found["errors"], found[THEIRS])
        totals_row(name, *(found[way].seconds for way in (THEIRS, "errors", FACTORS)), above)
    ways = (THEIRS, "errors", FACTORS)
    totals_row("all", *(sum(f[way].seconds for f in measured.values()) for way in ways), "")


def totals_row(name: str, theirs: float, errors: float, factors: float, above: str) -> None:
    asked = "25×" if name == "all" else ""
    row(
        name, f"{theirs:.2f}", f"{errors:.3f}", ratio(theirs, errors), asked,
        f"{factors:.3f}", ratio(theirs, factors), above,
    )  # fmt: skip


def excess(ours: Measured, theirs: Measured) -> str:
    relative = excesses(ours, theirs)
    return f"{sum(relative) / len(relative):+.2f} % / {max(relative):+.2f} %"


def excesses(ours: Measured, theirs: Measured) -> list[float]:
    pairs = zip(ours.errors, theirs.errors, strict=True)
    return [100 * (mine / other - 1) for mine, other in pairs]


def show_refined(measured: Mapping[str, Measured]) -> None:
    print("\n### Tucker by HOOI: errors and factors\n")
    print(
        "tensorly's Tucker is HOOI. Asked: 8× with every error at most 0.5 % above theirs."
        " The last row is what `Prepared.refined` does, up to 20 sweeps.\n"
    )
    header(
        "sweeps of HOOI", "runs", "s", "ratio", "error above theirs, mean / most", "within 0.5 %"
    )
    reference = measured[THEIRS]
    row("tensorly-torch", reference.runs, f"{reference.seconds:.2f}", "", "", "")
    for name, found in measured.items():
        if name in (THEIRS, "errors"):
            continue
        label = "none (HOSVD)" if name == FACTORS else name
        within = "yes" if max(excesses(found, reference)) <= 0.5 else "no"
        speed = ratio(reference.seconds, found.seconds)
        above = excess(found, reference)
        row(label, found.runs, f"{found.seconds:.2f}", speed, above, within)


def show_truth(cases: Sequence[Case]) -> None:
    print("\n### Reported errors against the truth\n")
    print("The truth is ‖W − W̃‖ in float64, with W̃ rebuilt from the factors. Asked: 1e-6.\n")
    header("method", "errors", "largest relative deviation")
    methods = {"tucker": Tucker(), "tucker by HOOI": Tucker(sweeps=2), "tt": TensorTrain()}
    for name, method in methods.items():
        chosen = method_cases(cases, name.partition(" ")[0])
        found = [deviation for case in chosen for deviation in deviations(case, method)]
        row(name, len(found), f"{max(found):.1e}")


def deviations(case: Case, method: Decomposition) -> list[float]:
    weight = case.conv.weight.detach().double()
    prepared = method.prepare(spec_of(case.conv), case.conv.weight.detach())
    found = []
    for rank in case.ranks:
        rebuilt = rebuilt_from(prepared.factors(rank), case.method)
        truth = float(torch.linalg.vector_norm(weight - rebuilt))
        found.append(abs(prepared.error(rank) - truth) / truth)
    return found


def rebuilt_from(factors: Sequence[Tensor], method: str) -> Tensor:
    """The dense weight (out, in, height, width) by a formula of its own."""
    first, *middle, last = factors
    ends = first.flatten(1), last.flatten(1)
    if method == "tucker":
        return torch.einsum("sc,rsyx,or->ocyx", ends[0], middle[0], ends[1])
    down, across = middle[0].squeeze(3), middle[1].squeeze(2)
    half = torch.einsum("ac,bay->bcy", ends[0], down)
    return torch.einsum("bcy,zbx,oz->ocyx", half, across, ends[1])


if __name__ == "__main__":
    main()
