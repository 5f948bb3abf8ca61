"""Distillation without labels: a compressed model learns what the dense one makes of inputs."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdkit.calibration.divergence import are_scores, divergence, divergences, outputs_of
from tdkit.compression.calibrating import Step
from tdkit.compression.lessons import Lesson, Lessons, shared_features, watched
from tdkit.datasets.base import fingerprint
from tdkit.errors import UnsupportedError, UsageError, first_line, option
from tdkit.forward.inputs import Inputs
from tdkit.forward.placement import device_of
from tdkit.forward.trial import mode
from tdkit.layers.reasons import is_factorization
from tdkit.progress import Progress
from tdkit.training.loop import (
    HALVES,
    TrainingState,
    own_global_generator,
    snapshot,
    trainable_weights,
)
from tdkit.training.resume import Resume

DISTILLATION = "distillation"
"""The name of the step."""

# So often the outputs on inputs held back are looked at, and the state is kept, at most.
_CHECKS = 20

# The share of the whole after which it ends if nothing was better meanwhile.
_PATIENCE = 0.75

# The highest learning rate where the outputs are all wrong, and its range. It is in proportion to
# their relative error: what is near already would first be driven away by large steps.
_RATE, _SLOWEST, _FASTEST = 3e-3, 1e-4, 2e-3

# Adam's, below the gradients of factors that share their norm badly.
_EPSILON = 1e-12

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h)")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Length:
    """How long to distil: a number of epochs, or a time.

    Attributes:
        epochs: Passes over the inputs.
        seconds: Of wall time, what the dense model takes included.
    """

    epochs: int | None = None
    seconds: float | None = None

    @classmethod
    def read(cls, value: object) -> Length:
        """Epochs as a number, 20, or a time as a text: 60s, 2m, 1h.

        Raises:
            UsageError: If it is neither.
        """
        text = str(value).strip()
        found = _TIME.fullmatch(text)
        if found is not None:
            return cls(seconds=float(found[1]) * _UNITS[found[2]])
        if not isinstance(value, bool) and text.isascii() and text.isdigit():
            return cls(epochs=int(text))
        raise UsageError(
            f"{option('distill', value)} is neither a number of epochs nor a time",
            f"write {option('distill', 20)} or {option('distill', '60s')}; 0 is not at all",
        )

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.epochs or self.seconds)


@dataclass(frozen=True)
class Check:
    """One line of a distillation's history.

    Attributes:
        epochs: How many are done; 0 stands for the weights before.
        steps: How many are done in all.
        position: The share of the whole that is done, from 0 to 1.
        loss: The mean since the line before; None for the first one.
        divergence: Of the outputs from the dense ones, on the inputs held back.
        seconds: Wall time so far.
    """

    epochs: int
    steps: int
    position: float
    loss: float | None
    divergence: float
    seconds: float


@dataclass(frozen=True)
class Taught:
    """A distillation that was done.

    Attributes:
        length: How long it was to be.
        learning_rate: Its highest.
        before: How far the outputs were from the dense ones on inputs held back.
        after: How far they are.
        history: What was looked at meanwhile.
        notes: What the user should know.
    """

    length: Length
    learning_rate: float
    before: float
    after: float
    history: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> Step:
        """The step on the way to the compressed model."""
        return Step(DISTILLATION, self.after)

    @property
    def is_better(self) -> bool:
        """Whether the model is another one than before."""
        return self.after < self.before

    def summary(self) -> dict[str, Any]:
        """The distillation as JSON values."""
        last = self.history[-1]
        return {
            **asdict(self.length),
            "learning_rate": self.learning_rate,
            "steps": last.steps,
            "divergence_before": self.before,
            "divergence_after": self.after,
            "history": [asdict(check) for check in self.history],
        }

    def line(self) -> str:
        """What a person is told at the end."""
        steps = f"{self.history[-1].steps:,} steps of distillation"
        return (
            f"{steps}: on inputs held back the outputs differ by {self.after:.2g}"
            f" where it was {self.before:.2g} before"
        )


@dataclass(frozen=True)
class Distillation:
    """A distillation that can be done.

    Attributes:
        length: How long.
        learning_rate: The highest, which falls to zero by a half cosine; None is in proportion to
            the relative error of the outputs that it starts with.
        seed: Of the order and the versions of the inputs.
        resume: The file to keep the state in.
    """

    length: Length
    learning_rate: float | None
    seed: int
    resume: Path | None = None

    def run(
        self,
        model: nn.Module,
        dense: nn.Module,
        batches: Sequence[Inputs],
        divisible: bool,
        progress: Progress = lambda stage, done, total: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Taught:
        """Distil a dense model into a compressed one, which is changed in place.

        The loss of a step is the divergence of the outputs (of scores Hinton, Vinyals and Dean
        2015 at temperature 1), the squared error of scores relative to theirs (Ba and Caruana
        2014), and that of the features behind every activation that both models have (Romero et al.
        2015). BatchNorm keeps its statistics. The weights of the least divergence on the inputs
        that are held back stay; those before where none is less. Frozen parameters stay as they
        are.

        Args:
            model: The compressed model.
            dense: It is afterwards as before, and shares no parameter that is trained.
            batches: Arguments of forward passes, tensors of any shape; the last tenth of them, at
                least one, is held back.
            divisible: Whether images can be put in other batches.
            progress: Called after every step.
            say: Called with a line now and then.

        Raises:
            UsageError: If no batch can be held back, or a kept state is of another distillation.
            UnsupportedError: If a model does not run on the inputs, returns no numbers, or no
                parameter requires a gradient.
            UnreadableFileError: If the kept state cannot be read.
        """
        if len(batches) < 2:
            raise UsageError(
                "distillation holds a part of the inputs back, and there is one batch of them",
                f"hand over several with {option('data')}",
            )
        held, resume = batches[-max(1, len(batches) // 10) :], self._resume(model, dense, batches)
        wanted = list(outputs_of(dense, held))
        _refuse_others(wanted, outputs_of(model, held))
        if not all(wanted):
            raise UnsupportedError("the model returns no numbers that another one could learn")
        lessons = Lessons(
            dense,
            batches[: len(batches) - len(held)],
            divisible,
            shared_features(dense, model),
            self.seed,
        )
        examined = _Held(held, wanted)
        before, plain = examined.divergence(model), snapshot(model)
        rate = self.learning_rate or _usual_rate(examined.error(model))
        kernels = any(parameter.ndim == 4 for parameter in model.parameters())
        with mode(model, training=False), trainable_weights(model, kernels):
            run = _Run(self, rate, model, lessons, examined, resume)
            try:
                run.all(progress, say)
            except BaseException:
                model.load_state_dict(plain)
                raise
            finally:
                run.optimizer.zero_grad()
        after = examined.divergence(model)
        notes = (*lessons.notes, *run.notes)
        if not after < before:
            model.load_state_dict(plain)
            notes += ("distillation made nothing better on the inputs held back: it is taken back",)
            after = before
        return Taught(self.length, rate, before, after, tuple(run.history), notes)

    def _resume(
        self, model: nn.Module, dense: nn.Module, batches: Sequence[Inputs]
    ) -> Resume | None:
        from tdkit.checkpoint import content_hash

        if self.resume is None:
            return None
        tensors = [tensor.detach().cpu() for batch in batches for tensor in batch.tensors]
        made_by = {
            "choice of options": f"{self.length!r}, {self.learning_rate!r}, seed {self.seed}",
            "model": content_hash(model),
            "dense model": content_hash(dense),
            "data set": fingerprint(*(x.float() if x.dtype in HALVES else x for x in tensors)),
        }
        return Resume(self.resume, made_by)


@dataclass(frozen=True)
class _Held:
    """Inputs that are held back, and what the dense model returns on them."""

    batches: Sequence[Inputs]
    wanted: Sequence[Sequence[Tensor]]

    def divergence(self, model: nn.Module) -> float:
        return divergence(self.wanted, outputs_of(model, _as_taken(self.batches, model)))

    def error(self, model: nn.Module) -> float:
        """Of the outputs, relative to what is wanted."""
        found = outputs_of(model, self.batches)
        missed = [
            float(_missed(have.double(), want.double()))
            for wanted, outputs in zip(self.wanted, found, strict=True)
            for want, have in zip(wanted, outputs, strict=True)
        ]
        return math.sqrt(sum(missed) / len(missed))


def _refuse_others(wanted: Sequence[Sequence[Tensor]], found: Iterable[Sequence[Tensor]]) -> None:
    """Refuse a model that returns other things than the one that it is to learn from."""
    want, have = ([tuple(x.shape) for x in outputs] for outputs in (wanted[0], next(iter(found))))
    if want != have:
        raise UsageError(
            f"the dense model returns tensors of the shapes {want}, and the compressed one {have}",
            "a model learns from the one that it was made of",
        )


def _as_taken(batches: Sequence[Inputs], model: nn.Module) -> Sequence[Inputs]:
    """Inputs in half precision as those of a model whose weights are in float32 meanwhile."""
    if any(parameter.dtype in HALVES for parameter in model.parameters()):
        return batches
    return [batch.map(lambda x: x.float() if x.dtype in HALVES else x) for batch in batches]


@dataclass
class _Mean:
    """Of losses."""

    total: float = 0.0
    count: int = 0

    def add(self, loss: float) -> None:
        self.total, self.count = self.total + loss, self.count + 1

    def take(self) -> float | None:
        mean = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return mean


class _Run:
    """A distillation under way."""

    def __init__(
        self,
        settings: Distillation,
        rate: float,
        model: nn.Module,
        lessons: Lessons,
        held: _Held,
        resume: Resume | None,
    ) -> None:
        self.settings, self.model, self.lessons, self.held = settings, model, lessons, held
        self.resume = resume
        self.generator = torch.Generator().manual_seed(settings.seed % 2**63)
        self.optimizer = _optimizer(model, rate)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.history: list[Check] = []
        self.notes: list[str] = []
        self.losses = _Mean()
        self.epochs, self.steps, self.is_broken = 0, 0, False
        self.start = time.perf_counter()
        self.best = snapshot(model)

    def all(self, progress: Progress, say: Callable[[str], None]) -> None:
        state = None if self.resume is None else self.resume.read()
        if state is not None:
            self._go_on(state)
        else:
            self._check(say)
        while not self._is_over():
            with own_global_generator(self.generator, device_of(self.model)), torch.enable_grad():
                self._epoch(progress)
            if not self.is_broken and self._is_due():
                self._check(say)
        self.model.load_state_dict(self.best)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def position(self) -> float:
        """The share of the whole that is done; from 1 on it is over."""
        length = self.settings.length
        if length.seconds is not None:
            return self.seconds / length.seconds
        return self.steps / max(1, (length.epochs or 0) * self.lessons.count)

    def _is_over(self) -> bool:
        best = min(self.history, key=lambda line: line.divergence)
        idle = self.history[-1].position - best.position
        return self.is_broken or self.history[-1].position >= 1 or idle >= _PATIENCE

    def _is_due(self) -> bool:
        return self.position >= min(1, self.history[-1].position + 1 / _CHECKS)

    def _epoch(self, progress: Progress) -> None:
        order = torch.randperm(self.lessons.count, generator=self.generator).tolist()
        for index in order:
            if self.position >= 1:
                break
            self._step(self.lessons.get(self.epochs, index))
            if self.is_broken:
                return
            self._tell(progress)
        self.epochs += 1

    def _step(self, lesson: Lesson) -> None:
        share = (1 + math.cos(math.pi * min(1, self.position))) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        loss = _loss(self.model, lesson)
        self.optimizer.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            self.is_broken = True
            self.notes.append(f"distillation ends at step {self.steps + 1}: its loss is {value}")
            return
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.losses.add(value)

    def _tell(self, progress: Progress) -> None:
        seconds, epochs = self.settings.length.seconds, self.settings.length.epochs
        if seconds is not None:
            whole = max(1, math.ceil(seconds))
            progress(DISTILLATION, min(whole, int(self.seconds)), whole)
        else:
            progress(DISTILLATION, self.steps, (epochs or 0) * self.lessons.count)

    def _check(self, say: Callable[[str], None]) -> None:
        found = self.held.divergence(self.model)
        line = Check(
            self.epochs,
            self.steps,
            min(1.0, self.position),
            self.losses.take(),
            found if math.isfinite(found) else math.inf,
            self.seconds,
        )
        if self.history and line.divergence < min(each.divergence for each in self.history):
            self.best = snapshot(self.model)
        self.history.append(line)
        say(_line(line))
        if self.resume is not None:
            self.resume.write(self._state())

    def _state(self) -> TrainingState:
        return {
            "model": snapshot(self.model),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "history": [asdict(line) for line in self.history],
            "best": self.best,
        }

    def _go_on(self, state: TrainingState) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history = [Check(**line) for line in state["history"]]
        self.best = dict(state["best"])
        last = self.history[-1]
        self.epochs, self.steps = last.epochs, last.steps
        self.start = time.perf_counter() - last.seconds


def _line(check: Check) -> str:
    loss = "" if check.loss is None else f"loss {check.loss:.4f}  "
    done = f"{DISTILLATION} {100 * check.position:3.0f} %  {check.steps:6,} steps"
    return f"{done}  {loss}divergence {check.divergence:.4g}"


def _loss(model: nn.Module, lesson: Lesson) -> Tensor:
    """How far a model is from the lesson, a scalar."""
    (inputs,) = _as_taken([lesson.inputs], model)
    with watched(model, list(lesson.features)) as seen:
        (found,) = _floats(model, inputs)
    loss = divergences([lesson.outputs], [found]).mean()
    pairs = [(f, w) for f, w in zip(found, lesson.outputs, strict=True) if are_scores(w)]
    for name, wanted in lesson.features.items():
        pairs += list(zip(seen.get(name, ()), wanted, strict=False))
    for have, want in pairs:
        if have.shape == want.shape:
            loss = loss + _missed(have, want).to(loss)
    return loss


def _floats(model: nn.Module, inputs: Inputs) -> list[list[Tensor]]:
    from torch.utils import _pytree as pytree

    try:
        leaves = pytree.tree_leaves(inputs.run(model))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model may fail in any way
        raise UnsupportedError(
            f"the model does not run on the data: {first_line(error)}"
        ) from error
    return [[x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]]


def _missed(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared error relative to what is wanted, a scalar; what is infinite is left out."""
    wanted = wanted.to(found.dtype)
    finite = wanted.isfinite()
    error = torch.where(finite, found - wanted, 0.0).square().mean()
    energy = torch.where(finite, wanted, 0.0).square().mean()
    return error / energy.clamp_min(torch.finfo(energy.dtype).tiny)


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise UnsupportedError(
            "no parameter of the model requires a gradient: there is nothing to distil into",
            "call model.requires_grad_() before compressing it",
        )
    shares = _shares(model)
    groups = [{"params": [each], "lr": rate * shares.get(each, 1.0)} for each in parameters]
    return torch.optim.AdamW(groups, lr=rate, eps=_EPSILON, weight_decay=0.0)


def _usual_rate(error: float) -> float:
    return min(max(_RATE * error, _SLOWEST), _FASTEST) if math.isfinite(error) else _FASTEST


def _shares(model: nn.Module) -> dict[Tensor, float]:
    """By factor its norm relative to the one that all of its chain would share evenly.

    With rates in proportion Adam's steps are those of a chain that shares it evenly, whose rates
    are all the same, and one that does so badly does not blow up.
    """
    shares: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Sequential) and is_factorization(module):
            factors = [p for p in module.parameters() if p.ndim > 1]
            norms = [float(torch.linalg.vector_norm(p.detach().double())) for p in factors]
            if factors and all(map(math.isfinite, norms)) and min(norms) > 0:
                even = math.exp(sum(map(math.log, norms)) / len(norms))
                shares |= {p: norm / even for p, norm in zip(factors, norms, strict=True)}
    return shares
