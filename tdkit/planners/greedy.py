"""The greedy planner: steepest move first, then exchanges that use up the slack."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from tdkit.planners.base import Option, UnreachableError

# Per layer: no change (None stands for it, saving and penalty 0) or one of the options.
_Choice = dict[str, Option]

_STARTS = 8


def greedy(options: Sequence[Option], needed: int) -> list[Option]:
    """Take the moves of least penalty per cost saved until enough is saved; see `Planner`.

    A move may replace an earlier, weaker one of the same layer. The last move is not the steepest
    but any that closes the gap; from the ends of least penalty, exchanges of one or two layers'
    moves use up what was saved too much.

    Raises:
        UnreachableError: If no choice saves enough.
    """
    fronts = _fronts(options)
    most = sum(front[-1].saving for front in fronts.values())
    if most < needed:
        raise UnreachableError(most)
    ends: list[_Choice] = []
    choice: _Choice = {}
    while (missing := needed - _saved(choice)) > 0:
        # Every move that would close the gap from here is an end of this path.
        closing = [move for gain, _, move in _moves(fronts, choice) if gain >= missing]
        ends += [{**choice, move.layer: move} for move in closing]
        steepest = min(
            _moves(fronts, choice), key=lambda entry: (entry[1] / entry[0], _key(entry[2]))
        )
        choice[steepest[2].layer] = steepest[2]
    ends = sorted([*ends, choice], key=_penalty)[:_STARTS]
    best = min((_settled(fronts, end, needed) for end in ends), key=_penalty)
    return sorted(best.values(), key=_key)


def _settled(fronts: Mapping[str, list[Option]], choice: _Choice, needed: int) -> _Choice:
    while (improved := _exchange(fronts, choice, needed)) is not None:
        choice = improved
    return choice


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


def _present(choice: _Choice, layer: str) -> tuple[int, float]:
    option = choice.get(layer)
    return (option.saving, option.penalty) if option else (0, 0.0)


def _saved(choice: _Choice) -> int:
    return sum(option.saving for option in choice.values())


def _penalty(choice: _Choice) -> float:
    return sum(option.penalty for option in choice.values())


def _key(option: Option) -> tuple[str, int, float]:
    return (option.layer, option.saving, option.penalty)
