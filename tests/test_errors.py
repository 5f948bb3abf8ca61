"""Messages speak of options by their key, and each door spells it."""

from tdkit.cli.spelling import ShellSpelling
from tdkit.errors import command, option, spelled


def test_python_is_spoken_to_in_python() -> None:
    assert option("input_shape", (3, 224, 224)) == "input_shape=(3, 224, 224)"
    assert option("methods", ["svd", "cp"]) == "methods=['svd', 'cp']"
    assert option("force", True) == "force=True"
    assert option("data") == "data="
    assert command("inspect") == "tdkit.inspect"


def test_the_shell_is_spoken_to_in_its_options() -> None:
    with spelled(ShellSpelling()):
        assert option("input_shape", (3, 224, 224)) == "--input-shape 3,224,224"
        assert option("methods", ["svd", "cp"]) == "--methods svd,cp"
        assert option("force", True) == "--force"
        assert option("data") == "--data"
        assert option("allow_classes", "mynet:MyNet") == "--allow-class mynet:MyNet"
        assert command("inspect") == "tdkit inspect"
        assert command("plan") == "tdkit compress --dry-run"
    assert option("data") == "data="
