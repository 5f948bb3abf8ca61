"""The greedy planner's own promises."""

import numpy as np
import pytest

from tdkit.planners.base import Option
from tdkit.planners.exact import exact
from tdkit.planners.greedy import greedy


def convex_layers(layers: int, ranks: int, seed: int) -> list[Option]:
    """Layers of very different sizes whose squared errors rise as they are cut, as real ones do."""
    random = np.random.default_rng(seed)
    options = []
    for layer in range(layers):
        parameters = int(random.integers(1_000, 100_000))
        steepness = random.uniform(1, 4)
        for keep in np.linspace(0.03, 0.9, ranks):
            penalty = (1 - keep) ** steepness * random.uniform(0.9, 1.1)
            saving = int(parameters * (1 - keep))
            options.append(Option(f"layer{layer:02}", saving, penalty, len(options)))
    return options


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.75, 0.9])
def test_within_two_percent_of_the_exact_optimum(seed: int, share: float) -> None:
    options = convex_layers(layers=6, ranks=15, seed=seed)
    needed = int(
        share * sum(max(o.saving for o in options if o.layer == n) for n in layers(options))
    )
    penalty, least = (sum(o.penalty for o in plan(options, needed)) for plan in (greedy, exact))
    assert least * (1 - 1e-9) <= penalty <= 1.02 * least


def layers(options: list[Option]) -> set[str]:
    return {option.layer for option in options}


def test_a_stronger_move_replaces_an_earlier_one() -> None:
    options = [Option("a", 10, 0.1, 0), Option("a", 30, 0.5, 1), Option("b", 10, 0.9, 2)]
    assert greedy(options, 20) == [options[1]]


def test_the_last_move_does_not_overshoot_needlessly() -> None:
    # Per unit saved the large move of b is the best, but a small one is all that is missing.
    options = [Option("a", 50, 0.1, 0), Option("b", 100, 0.5, 1), Option("c", 5, 0.06, 2)]
    assert greedy(options, 55) == [options[0], options[2]]


def test_an_option_that_saves_nothing_is_never_taken() -> None:
    options = [Option("a", -5, 0.0, 0), Option("a", 0, 0.0, 1), Option("a", 3, 0.2, 2)]
    assert greedy(options, 2) == [options[2]]


def test_a_hundred_layers_take_no_time_worth_mentioning() -> None:
    options = convex_layers(layers=100, ranks=20, seed=0)
    needed = int(0.5 * sum(o.saving for o in options) / 20)
    assert sum(option.saving for option in greedy(options, needed)) >= needed
