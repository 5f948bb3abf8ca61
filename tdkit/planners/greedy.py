"""The greedy planner: steepest move first, then exchanges that use up the slack."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from tdkit.planners.base import Option, UnreachableError

# Per layer: no change (None stands for it, saving and penalty 0) or one of the options.
_Choice = dict[str, Option]


def greedy(options: Sequence[Option], needed: int) -> list[Option]:
    """Take the moves of least penalty per cost saved until enough is saved; see `Planner`.

    A move may replace an earlier, weaker one of the same layer. The last move is the one that
    closes the gap at the least penalty, not the steepest, and exchanges of one or two layers'
    moves then use up what it saved too much.
    """
    fronts = _fronts(options)
    most = sum(front[-1].saving for front in fronts.values())
    if most < needed:
        raise UnreachableError(most)
    best: _Choice | None = None
    choice: _Choice = {}
    while (missing := needed - _saved(choice)) > 0:
        closing = [(gain, move) for gain, cost, move in _moves(fronts, choice) if gain >= missing]
        if closing:
            # Moves from here on only raise the penalty of this path; another path may end lower.
            last = min(closing, key=lambda pair: _added(choice, pair[1]))[1]
            best = _better(best, {**choice, last.layer: last})
        steepest = min(
            _moves(fronts, choice), key=lambda entry: (entry[1] / entry[0], _key(entry[2]))
        )
        choice[steepest[2].layer] = steepest[2]
    best = _better(best, choice)
    while (improved := _exchange(fronts, best, needed)) is not None:
        best = improved
    return sorted(best.values(), key=_key)


def _fronts(options: Sequence[Option]) -> dict[str, list[Option]]:
    """Per layer the options that no other beats in both saving and penalty, by rising saving."""
    fronts: dict[str, list[Option]] = {}
    ordered = sorted(options, key=lambda o: (o.layer, -o.saving, o.penalty, o.index))
    for option in ordered:
        front = fronts.setdefault(option.layer, [])
        if option.saving > 0 and (not front or option.penalty < front[-1].penalty):
            front.append(option)
    return {layer: front[::-1] for layer, front in sorted(fronts.items()) if front}


def _moves(
    fronts: Mapping[str, Sequence[Option]], choice: _Choice
) -> Iterator[tuple[int, float, Option]]:
    """(extra saving, extra penalty, option) of every move that saves more than the present one."""
    for layer, front in fronts.items():
        saving, penalty = _present(choice, layer)
        for option in front:
            if option.saving > saving:
                yield option.saving - saving, option.penalty - penalty, option


def _exchange(fronts: Mapping[str, list[Option]], choice: _Choice, needed: int) -> _Choice | None:
    """The best change of one layer, or of two, that lowers the penalty and still saves enough."""
    slack = _saved(choice) - needed
    savings = {layer: [option.saving for option in front] for layer, front in fronts.items()}
    best, gain = None, 1e-12 * _penalty(choice)

    def relax(layer: str, spare: int) -> tuple[float, Option | None]:
        # The least penalty this layer can have if it may save `spare` less than now.
        saving, penalty = _present(choice, layer)
        if saving <= spare:
            return penalty, None
        option = fronts[layer][bisect_left(savings[layer], saving - spare)]
        return penalty - option.penalty, option

    for layer in choice:
        lowered, option = relax(layer, slack)
        if lowered > gain:
            best, gain = _with(choice, layer, option), lowered
    for extra, added, option in _moves(fronts, choice):
        for layer in choice:
            if layer == option.layer:
                continue
            lowered, other = relax(layer, slack + extra)
            if lowered - added > gain:
                changed = _with(choice, layer, other)
                best, gain = _with(changed, option.layer, option), lowered - added
    return best


def _with(choice: _Choice, layer: str, option: Option | None) -> _Choice:
    rest = {name: kept for name, kept in choice.items() if name != layer}
    return rest if option is None else {**rest, layer: option}


def _better(one: _Choice | None, other: _Choice) -> _Choice:
    return other if one is None or _penalty(other) < _penalty(one) else one


def _present(choice: _Choice, layer: str) -> tuple[int, float]:
    option = choice.get(layer)
    return (option.saving, option.penalty) if option else (0, 0.0)


def _added(choice: _Choice, option: Option) -> float:
    return option.penalty - _present(choice, option.layer)[1]


def _saved(choice: _Choice) -> int:
    return sum(option.saving for option in choice.values())


def _penalty(choice: _Choice) -> float:
    return sum(option.penalty for option in choice.values())


def _key(option: Option) -> tuple[str, int, float]:
    return (option.layer, option.saving, option.penalty)
