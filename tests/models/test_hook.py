import subprocess
import sys

from tdkit.builtin import tdkit_models


def test_the_hooks_import_no_torch():
    script = (
        "import sys\n"
        "import tdkit.builtin\n"
        "assert len(tdkit.builtin.tdkit_models()) == 82\n"
        "assert len(tdkit.builtin.tdkit_datasets()) == 4\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)


def test_own_models_are_built_as_recorded():
    records = {record.name: record for record in tdkit_models()}
    for name in ("garipov", "resnet18-cifar"):
        record = records[name]
        model = record.create()
        parameters = list(model.parameters())
        assert parameters[0].shape[1] == record.input_shape[0]
        assert parameters[-1].shape == (record.num_classes,)
        other = list(record.create(in_channels=2, num_classes=3).parameters())
        assert other[0].shape[1] == 2
        assert other[-1].shape == (3,)


def test_bundled_weights_are_the_default_ones():
    records = {record.name: record for record in tdkit_models()}
    garipov = records["garipov"]
    assert next(iter(garipov.weights)) == "fashion-mnist"
    weights = garipov.weights["fashion-mnist"]()
    garipov.create().load_state_dict(weights, strict=True)
    assert next(iter(records["resnet50"].weights)) == "imagenet"
