"""Opening a study: what its data must be."""

import pytest
import tiny_study
import torch

import tdkit
from tdkit.errors import UsageError
from tdkit.opening import Source
from tdkit.study.opening import NamedStudy

BATCHES = [(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))]


@pytest.mark.parametrize("data", [BATCHES, BATCHES[0], BATCHES[0][0]])
@pytest.mark.parametrize("model", ["garipov", tiny_study.network()])
def test_data_that_are_no_data_set_are_refused_with_the_next_step(model, data) -> None:
    with pytest.raises(UsageError, match=f"the data are of type {type(data).__name__}, ") as caught:
        tdkit.validate(model, data)
    assert "neither a Dataset nor the name of one" in str(caught.value)
    assert "in_memory_dataset" in str(caught.value.hint)
    assert "data='image-folder:PATH'" in str(caught.value.hint)


@pytest.mark.parametrize("model", ["garipov", tiny_study.network()])
def test_a_model_without_data_is_refused_with_the_next_step(model) -> None:
    with pytest.raises(UsageError, match=r"^model= needs images to measure it on$") as caught:
        tdkit.validate(model, None)
    assert "data='image-folder:PATH'" in str(caught.value.hint)


def test_a_study_of_something_named_needs_the_name_of_data() -> None:
    with pytest.raises(UsageError, match="the data are of type Dataset, "):
        NamedStudy(tiny_study.RECIPE, tiny_study.noise(), Source("garipov"))  # type: ignore[arg-type]
