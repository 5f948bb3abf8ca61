"""What models are shown: batches, data sets, examples of every form; and who owns the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_cnn import SHAPE, dataset, images, network, same
from torch import Tensor, nn

import tdkit
from tdkit.errors import UsageError

SVD: dict[str, Any] = {"methods": "svd", "keeps": 0.4, "measure": False}


def test_batches_alone_are_what_batchnorm_is_fitted_on(model) -> None:
    data = [images(8), images(4)]
    options: dict[str, Any] = {"layers": "2", "data": data, **SVD}
    found = tdkit.compress(model, 0.9, **options)
    named = tdkit.compress(model, 0.9, calibration="data", **options)
    noise = tdkit.compress(model, 0.9, calibration="noise", **options)
    assert (found.calibration, found.plan.calibration) == ("data", "data")
    assert same(found.model, named.model)
    assert not same(found.model, noise.model)
    assert found.verified
    again = tdkit.apply(found.plan, model, data=data, measure=False)
    assert (again.calibration, same(again.model, found.model)) == ("data", True)
    # The plan says what it was; without data there is nothing to fit on.
    with pytest.raises(UsageError, match="calibrating BatchNorm on data needs training images"):
        tdkit.apply(found.plan, model, input_shape=SHAPE, measure=False)
    blind = tdkit.apply(found.plan, model, input_shape=SHAPE, calibration="noise", measure=False)
    assert same(blind.model, noise.model)


def test_a_data_set_calibrates_and_measures(model) -> None:
    data = dataset()
    done = tdkit.compress(model, 0.8, data=data, methods="svd", keeps=0.4, batch_size=1)
    assert done.calibration == "data"
    assert done.report.images == 60
    assert done.report.accuracy is not None
    assert done.report.latency is not None
    assert done.opened.shape == SHAPE
    applied = tdkit.apply(done.plan, model, data=data, batch_size=1)
    assert same(applied.model, done.model)
    assert applied.report.accuracy == done.report.accuracy
    tuning: dict[str, Any] = {"finetune": 1, "learning_rate": 0.05, "batch_size": 1}
    tuned = tdkit.compress(model, 0.8, data=data, methods="svd", keeps=0.4, **tuning)
    assert tuned.report.finetuning is not None
    assert tuned.report.finetuning["epochs"] == 1
    assert "learning rate 0.05, as asked for" in tuned.notes
    assert tuned.report.compressed == done.report.accuracy[1]


def test_a_data_set_may_be_named() -> None:
    done = tdkit.compress(
        "garipov", 0.5, data="fashion-mnist-sample", samples=32, methods="svd", measure=False
    )
    assert (done.calibration, done.plan.calibration) == ("data", "data")
    assert done.report.costs["params"].after <= done.report.costs["params"].before / 2
    with pytest.raises(UsageError, match="no data set named 'fashion-mnist-sampel'"):
        tdkit.compress("garipov", 0.5, data="fashion-mnist-sampel")


class Words(nn.Module):
    """Takes numbers of words and a mask, by name or not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.stem, self.body, self.head = (nn.Linear(16, n) for n in (16, 16, 3))

    def forward(self, words: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.body(self.stem(self.embedding(words)).relu()).relu()
        return self.head(found if mask is None else found * mask[..., None]).mean(1)


class Nested(Words):
    """Takes a dict of a list."""

    def forward(self, batch: dict[str, list[Tensor]]) -> Tensor:  # type: ignore[override]
        return super().forward(*batch["inputs"])


@pytest.mark.parametrize(
    ("make", "wrap"),
    [
        (Words, lambda words, mask: words),
        (Words, lambda words, mask: (words,)),
        (Words, lambda words, mask: (words, mask)),
        (Words, lambda words, mask: {"words": words, "mask": mask}),
        (Nested, lambda words, mask: ({"inputs": [words, mask]},)),
        (Nested, lambda words, mask: {"batch": {"inputs": [words, mask]}}),
    ],
)
def test_examples_of_every_form_verify_and_count(make, wrap) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    example = wrap(torch.randint(20, (2, 7)), torch.ones(2, 7))
    found = tdkit.compress(model, 0.9, cost="macs", example_inputs=example, **SVD)
    assert found.verified
    assert [move.layer for move in found.plan.moves] == ["body"]
    assert tdkit.inspect(model, example_inputs=example).macs == 7 * (16 * 16 * 2 + 16 * 3)
    batched = tdkit.compress(model, 0.9, cost="macs", data=[example], **SVD)
    assert same(batched.model, found.model)


def test_in_place_is_the_model_itself(model) -> None:
    expected = tdkit.compress(network(), 0.8, input_shape=SHAPE, **SVD)
    done = tdkit.compress(model, 0.8, input_shape=SHAPE, inplace=True, **SVD)
    assert done.model is model
    assert same(model, expected.model)
    assert done.report.latency is None
    again = network()
    applied = tdkit.apply(done.plan, again, input_shape=SHAPE, inplace=True)
    assert applied.model is again
    assert same(again, model)


def test_a_model_of_a_file_that_is_not_measured(model, tmp_path) -> None:
    torch.save(model, tmp_path / "mine.pt")
    done = tdkit.compress(tmp_path / "mine.pt", 0.8, input_shape=SHAPE, **SVD)
    assert same(done.model, tdkit.compress(model, 0.8, input_shape=SHAPE, **SVD).model)
    assert (done.report.latency, done.report.accuracy) == (None, None)
    assert done.report.bytes[1] < done.report.bytes[0]


def test_progress_is_called_back_or_a_bar_where_there_is_a_terminal(
    model, monkeypatch, capsys
) -> None:
    steps: list[tuple[str, int, int]] = []
    plan = tdkit.plan(model, 0.8, input_shape=SHAPE, methods="svd", keeps=0.4)
    tdkit.apply(plan, model, progress=lambda *step: steps.append(step), measure=False)
    assert steps[0] == ("replacing, verifying, calibrating", 0, 0)
    assert all(0 <= done <= total or total == 0 for _, done, total in steps)
    tdkit.score(model, progress=True, methods="svd", keeps=0.4)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    tdkit.score(model, progress=True, methods="svd", keeps=0.4)
    assert "scoring" in capsys.readouterr().err
