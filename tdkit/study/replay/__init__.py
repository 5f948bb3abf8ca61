"""Predictions of a model with one layer replaced, without computing again what ran before it.

The dense model runs once per batch. What its modules returned before the layer's first call does
not depend on the layer, so for every stand-in they return it again instead of computing it, whole
blocks at once; from the layer on everything runs. This goes by call and not by name, so a module
may be called several times.

Which calls can be replayed is read off a scouting pass over two samples: those that ended before
the layer's first call, changed none of their inputs in place and returned nothing but tensors.
The tensors' version counters tell what is changed in place (``out += identity``,
``ReLU(inplace=True)``): such outputs are remembered and handed out as copies. Where the very next
thing that happens to an output is a module that changes it in place, it is handed out as it is
after that; reading it in between without an operator of torch, as ``numpy()`` does, is not seen.
The rest is checked again on every batch, and on the first batch the logits of a
replay are compared with those of a full pass. Where anything does not fit (data-dependent control
flow, weights that are read without calling their module), full passes give the result instead.
"""

from tdkit.study.replay.following import Watch
from tdkit.study.replay.logits import dense_predictions, reason_of
from tdkit.study.replay.session import predictions, replaced_predictions

__all__ = ["Watch", "dense_predictions", "predictions", "reason_of", "replaced_predictions"]
