"""What an option is when nobody says: every default is written here, once, without torch."""

from __future__ import annotations

from typing import Final

BUDGET = 0.5
"""The fraction of the model's cost that may remain."""

BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
"""Those of a trade-off."""

COST = "params"
METRIC = "relative-weights"
PLANNER = "greedy"

SEVERAL_PLANNER = "exact"
"""Where there are several bounds, which greedy does not hold."""

RULE = "best"

CALIBRATION = "auto"
"""What a plan says, else data where there are some, else noise."""

SAMPLES = 512
"""Inputs to calibrate on, and for metrics and methods that look at data."""

SCORE_SAMPLES = 256
"""Inputs for feature metrics where nothing but scores are asked for."""

BATCH_SIZE = 32
"""Inputs of a timed pass."""

SEED = 0
DEVICE = "auto"

EPOCHS = 10
"""Passes over the training images of a fine-tuning, at most."""

PATIENCE = 5
"""Epochs without a better validation accuracy after which a fine-tuning stops."""

AUTOCAST: Final = "none"
"""The type that a fine-tuning computes in, where it is another than the parameters'."""

EFFORTS = ("fast", "default", "best")
"""``fast`` fits BatchNorm's statistics to data, ``default`` the factors of every layer, ``best``
those to the activations that follow as well, and distils."""

EFFORT = "default"

OLD_EFFORT = "fast"
"""What a plan means that does not say."""

NO_DATA_CALIBRATION: Final = "noise"
"""What BatchNorm is fitted to where a plan does not say on what."""

BEST_NO_DATA_CALIBRATION: Final = "synthetic"
"""The same where the best effort is asked for."""

DISTILL = "60s"
"""How long a distillation is, by itself and under the effort ``best`` with data."""
