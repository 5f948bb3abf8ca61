"""Every public function takes a module, a file or a name, and its record prints itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_cnn import SHAPE, dataset, network
from torch import nn

import tdkit
from tdkit.errors import UsageError

SVD: dict[str, Any] = {"methods": "svd", "keeps": 0.5, "layers": "5", "input_shape": SHAPE}

JOBS = {
    "inspect": lambda model: tdkit.inspect(model, input_shape=SHAPE),
    "score": lambda model: tdkit.score(model, ["relative-weights", "absolute-weights"], **SVD),
    "plan": lambda model: tdkit.plan(model, 0.8, **SVD),
    "compress": lambda model: tdkit.compress(model, 0.8, measure=False, **SVD),
    "apply": lambda model: tdkit.apply(
        tdkit.Plan((tdkit.Move("5", "svd", 4),)), model, input_shape=SHAPE, measure=False
    ),
    "distill": lambda model: tdkit.distill(model, network(1), dataset(), distill=1),
    "finetune": lambda model: tdkit.finetune(model, dataset(), epochs=1, learning_rate=0.01),
}


def prints(record: Any) -> list[str]:
    """The lines of a record, which shows the same words in a notebook."""
    text, html = str(record), record._repr_html_()
    assert "<table>" in html
    assert len(text.splitlines()) > 1
    return text.splitlines()


@pytest.fixture
def file(tmp_path: Path, model: nn.Sequential) -> Path:
    path = tmp_path / "mine.pt"
    torch.save(model, path)
    return path


@pytest.mark.parametrize("job", JOBS)
def test_a_module_and_its_file_give_records_that_print_the_same(job, model, file) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    of_module, of_file, of_text = (JOBS[job](given) for given in (model, file, str(file)))
    assert prints(of_module) == prints(of_file) == prints(of_text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("job", ["inspect", "score", "plan", "compress"])
def test_a_registered_name_will_do(job) -> None:
    options: dict[str, Any] = {"weights": "none", "layers": "conv2"}
    if job != "inspect":
        options |= {"methods": "svd", "keeps": 0.5}
    options |= {"compress": {"budget": 0.97, "measure": False}, "plan": {"budget": 0.97}}.get(
        job, {}
    )
    record = getattr(tdkit, job)("garipov", **options)
    assert any("conv2" in line for line in prints(record))


def test_a_compression_prints_moves_and_totals_and_is_json(model) -> None:
    done = tdkit.compress(model, 0.8, measure=False, **SVD)
    lines = prints(done)
    assert lines[0].split() == ["layer", "method", "rank", "parameters", "after", "kept", "error"]
    assert any(line.startswith("parameters ") for line in lines)
    assert lines[-1] == "BatchNorm is calibrated on noise"
    value = json.loads(json.dumps(done.to_json()))
    assert (value["budget"], value["output"], value["put_back"]) == (0.8, None, {})
    assert [move["layer"] for move in value["moves"]] == ["5"]
    assert prints(done.report) == str(done.report.table()).splitlines()


def test_plugins_print_a_table_for_each(monkeypatch) -> None:
    found = tdkit.plugins()
    lines = prints(found)
    assert lines[1].split() == ["kind", "name", "summary"]
    assert any("tucker" in line for line in lines)
    assert found.to_json()["plugins"][0]["name"] == "tdkit"


def test_a_study_prints_what_the_command_does() -> None:
    study = tdkit.validate(
        network(), dataset(), layers="5", methods="svd", keeps=[0.6, 0.3], no_finetune=True
    )
    lines = prints(study)
    assert lines[0] == study.analysis.title
    assert any("Kendall's τ-a" in line for line in lines)
    assert any(line.startswith("Which error: ") for line in lines)
    assert study.failed == 0
    assert study.to_json()["measured"] == len(study.results.measurements) == 2


def test_batches_with_labels_are_no_data_of_a_study(model) -> None:
    batch = (torch.zeros(2, *SHAPE), torch.zeros(2, dtype=torch.long))
    with pytest.raises(
        UsageError, match="the data are of type list, which is neither a Dataset nor"
    ):
        tdkit.validate(model, [batch])


def test_a_table_escapes_names_and_aligns_numbers() -> None:
    from tdkit.tables import Table

    table = Table(("layer", "n"), (("a<b", "1"), ("c", "1,000")), frozenset(["n"]))
    assert str(table).splitlines() == ["layer      n", "a<b        1", "c      1,000"]
    html = table._repr_html_()
    assert "a&lt;b" in html
    assert 'text-align: right">1,000' in html
