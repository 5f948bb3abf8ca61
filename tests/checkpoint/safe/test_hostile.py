"""Files that are broken, forged or out to harm: the section "Model file" of bad-inputs.md."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from tdkit.checkpoint import contents as contents_module
from tdkit.checkpoint import load_into, load_model
from tdkit.checkpoint.safe.pickles import Scan
from tdkit.cli.spelling import ShellSpelling
from tdkit.errors import (
    TdkitError,
    UnreadableFileError,
    UnsafeFileError,
    UnsupportedError,
    UsageError,
    spelled,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

GIB = 2**30


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.pt"


def refused(file: Path, error: type[TdkitError], match: str, **options: Any) -> TdkitError:
    """The file is refused with one message that names it, and with a next step."""
    with pytest.raises(error, match=match) as caught:
        load_model(file, models={}, **options)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert message.isprintable()
    assert caught.value.hint
    return caught.value


# A small pickle assembler


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*values: bytes) -> bytes:
    return b"(" + b"".join(values) + b"t"


def mapping(values: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def called(function: bytes, *args: bytes) -> bytes:
    return function + several(*args) + b"R"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


ORDERED = called(name("collections", "OrderedDict"))
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
CONV = name("torch.nn.modules.conv", "Conv2d")
SEQUENTIAL = name("torch.nn.modules.container", "Sequential")


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage") -> bytes:
    return (
        several(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"
    )


def tensor(
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    hooks: bytes = ORDERED,
    of: bytes | None = None,
) -> bytes:
    return called(
        name("torch._utils", "_rebuild_tensor_v2"),
        of or storage(),
        number(offset),
        several(*map(number, size)),
        several(*map(number, stride)),
        FALSE,
        hooks,
    )


def ordered(values: Mapping[str, bytes]) -> bytes:
    return ORDERED + b"(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def module(cls: bytes = SEQUENTIAL, **state: bytes) -> bytes:
    usual = {
        "training": TRUE,
        "_forward_hooks": ordered({}),
        "_backward_hooks": ordered({}),
        "_parameters": ordered({}),
        "_buffers": ordered({}),
        "_modules": ordered({}),
    }
    return cls + b")\x81" + mapping({**usual, **state}) + b"b"


def archive(
    file: Path,
    value: bytes,
    entries: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """A zip file like torch.save's, around any pickle; the storage 0 has four floats."""
    usual = {"version": b"3\n", "byteorder": b"little", "data/0": struct.pack("<4f", 1, 2, 3, 4)}
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr("archive/data.pkl", pickled(value))
        for key, data in {**usual, **(entries or {})}.items():
            target.writestr(f"archive/{key}", data)
    return file


def saved(value: Any, file: Path, **options: Any) -> Path:
    torch.save(value, file, **options)
    return file


def test_the_assembler_makes_files_that_load(file: Path) -> None:
    archive(file, mapping({"a": tensor((2, 2), (2, 1))}))
    assert torch.load(file, weights_only=True)["a"].tolist() == [[1, 2], [3, 4]]
    loaded = load_model(archive(file, module()), models={})
    assert type(loaded.model) is nn.Sequential


# Cases 1 to 8: no model file at all


def missing(path: Path) -> None:
    pass


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.parent / "gone.pt")


def empty(path: Path) -> None:
    path.touch()


def a_text_file(path: Path) -> None:
    path.write_text("epochs: 90\nlr: 0.1\n")


def text_in_utf8(path: Path) -> None:
    path.write_text("é" * 5000, encoding="utf-8")


def a_web_page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


def a_git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 45\n")


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(7, 256)) * 20)


def a_gzip_archive(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b" + bytes(50))


def an_hdf5_file(path: Path) -> None:
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))


def a_truncated_zip(path: Path) -> None:
    torch.save(nn.Linear(50, 50), path)
    path.write_bytes(path.read_bytes()[:4000])


def a_zip_with_nothing(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


def a_zip_without_data_pkl(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("archive/version", "3\n")


def a_zip_of_numpy_arrays(path: Path) -> None:
    with path.open("wb") as handle:
        np.savez(handle, a=np.zeros(3), b=np.ones(3))


def a_plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}, protocol=2))


def a_plain_pickle_of_tensors(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": torch.zeros(3)}, protocol=4))


NO_MODEL = [
    (missing, "does not exist"),
    (a_folder, "is a folder"),
    (a_pipe, "is not an ordinary file"),
    (a_link_to_nowhere, "does not exist"),
    (empty, "is empty"),
    (a_text_file, "is a text file"),
    (text_in_utf8, "is a text file"),
    (a_web_page, "is a web page"),
    (a_git_lfs_pointer, "is a git-LFS pointer"),
    (random_bytes, "neither a PyTorch nor a safetensors file"),
    (a_gzip_archive, "a gzip archive"),
    (an_hdf5_file, "an HDF5 file"),
    (a_truncated_zip, "cut short"),
    (a_zip_with_nothing, "neither a PyTorch nor a safetensors file"),
    (a_zip_without_data_pkl, "without data.pkl"),
    (a_zip_of_numpy_arrays, "torch.save did not write"),
    (a_plain_pickle, "written by pickle"),
    (a_plain_pickle_of_tensors, "written by pickle"),
]


@pytest.mark.parametrize(("make", "match"), NO_MODEL, ids=[case[0].__name__ for case in NO_MODEL])
def test_what_is_no_model_is_named(file: Path, make: Callable[[Path], None], match: str) -> None:
    make(file)
    refused(file, UnreadableFileError, match)


def test_unreadable(file: Path, tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny, file)

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(file, UnreadableFileError, "may not be read by this user")


@pytest.mark.parametrize("source", ["a\0b.pt", "x" * 5000 + ".pt", "/proc/self/mem/model.pt"])
def test_impossible_paths(source: str) -> None:
    with pytest.raises(UnreadableFileError, match=r"cannot be opened"):
        load_model(source, models={})


# Case 9


@pytest.mark.parametrize("entry", ["data/0", "data.pkl", "version"])
def test_one_flipped_bit(file: Path, tiny: nn.Module, entry: str) -> None:
    saved(tiny, file)
    with zipfile.ZipFile(file) as source:
        info = source.getinfo(f"model/{entry}")
        offset = info.header_offset + 30 + sum(_local_lengths(file, info.header_offset)) + 1
    data = bytearray(file.read_bytes())
    data[offset] ^= 64
    file.write_bytes(data)
    refused(file, UnreadableFileError, f"is damaged: its entry {entry}")


def _local_lengths(file: Path, offset: int) -> tuple[int, int]:
    lengths: tuple[int, int] = struct.unpack("<2H", file.read_bytes()[offset + 26 : offset + 30])
    return lengths


def test_truncated_at_every_length(tmp_path: Path) -> None:
    whole = saved({"a": torch.arange(6.0)}, tmp_path / "whole.pt").read_bytes()
    cut = tmp_path / "cut.pt"
    for length in range(1, len(whole), 37):
        cut.write_bytes(whole[:length])
        with pytest.raises(TdkitError, match=r"cut\.pt"):
            load_model(cut, models={})


def test_any_byte_changed_never_ends_in_another_error(tmp_path: Path) -> None:
    whole = saved(nn.Sequential(nn.Linear(2, 2)), tmp_path / "whole.pt").read_bytes()
    changed = tmp_path / "changed.pt"
    for position in range(0, len(whole), 11):
        data = bytearray(whole)
        data[position] ^= 1 << position % 8
        changed.write_bytes(data)
        try:
            loaded = load_model(changed, models={})
        except TdkitError:
            continue
        assert isinstance(loaded.model, nn.Sequential)


def test_any_pickle_byte_changed_never_ends_in_another_error(tmp_path: Path) -> None:
    """The same behind a correct checksum: what a forger would do."""
    whole = saved(nn.Sequential(nn.Linear(2, 2)), tmp_path / "whole.pt")
    with zipfile.ZipFile(whole) as source:
        original = source.read("whole/data.pkl")
        weights = {f"data/{i}": source.read(f"whole/data/{i}") for i in (0, 1)}
    forged = tmp_path / "forged.pt"
    for position in range(2, len(original)):
        data = bytearray(original)
        data[position] ^= 1 << position % 8
        archive(forged, bytes(data[2:-1]), weights)
        try:
            load_model(forged, models={})
        except TdkitError:
            continue


# Cases 10 to 12: small files that want much memory


def a_deflate_bomb(file: Path) -> None:
    zeros = {"data/0": bytes(2**26)}
    numel = 2**24
    archive(file, mapping({"a": tensor(of=storage(numel=numel))}), zeros, zipfile.ZIP_DEFLATED)


def an_8_gb_bytearray(file: Path) -> None:
    archive(file, mapping({"a": called(name("builtins", "bytearray"), number(8 * GIB))}))


def an_8_gb_bytearray_as_in_python_2(file: Path) -> None:
    archive(file, mapping({"a": called(name("__builtin__", "bytearray"), number(8 * GIB))}))


def a_stride_0_tensor(file: Path) -> None:
    archive(file, mapping({"a": tensor((10**12,), (0,), of=storage(numel=4))}))


def a_stride_0_tensor_of_strange_type(file: Path) -> None:
    value = called(
        name("torch._utils", "_rebuild_tensor_v3"),
        storage(kind="FloatStorage"),
        number(0),
        several(number(10**12)),
        several(number(0)),
        FALSE,
        ORDERED,
        name("torch", "float16"),
    )
    archive(file, mapping({"a": value}))


def a_tensor_beyond_its_storage(file: Path) -> None:
    archive(file, mapping({"a": tensor((4,), (1,), offset=2**40)}))


def a_tensor_with_wide_strides(file: Path) -> None:
    archive(file, mapping({"a": tensor((4,), (2**40,))}))


def a_storage_larger_than_its_entry(file: Path) -> None:
    archive(file, mapping({"a": tensor((2**40,), (1,), of=storage(numel=2**40))}))


def many_views_of_one_storage(file: Path) -> None:
    data = {"data/0": bytes(4 * 2**16)}
    value = tensor((2**16,), (1,), of=storage(numel=2**16))
    archive(file, mapping({str(i): value for i in range(100)}), data)


def a_linear_layer_made_by_a_call(file: Path) -> None:
    linear = name("torch.nn.modules.linear", "Linear")
    archive(file, module(_modules=ordered({"0": called(linear, number(10**6), number(10**6))})))


def a_tensor_made_by_a_call(file: Path) -> None:
    archive(file, mapping({"a": called(name("torch", "FloatTensor"), number(2**36))}))


def an_untyped_storage_made_by_a_call(file: Path) -> None:
    made = called(name("torch.storage", "UntypedStorage"), number(2**36))
    archive(file, mapping({"a": made}))


def a_sparse_tensor_of_10_to_the_15(file: Path) -> None:
    layout = called(name("torch.serialization", "_get_layout"), text("torch.sparse_coo"))
    indices = tensor((2, 1), (1, 1), of=storage("1", 2, "LongStorage"))
    parts = several(indices, tensor((1,), (1,)), several(number(10**8), number(10**7)))
    value = called(name("torch._utils", "_rebuild_sparse_tensor"), layout, parts)
    archive(file, mapping({"a": value}), {"data/1": bytes(16)})


def an_lstm_of_10_to_the_12_layers(file: Path) -> None:
    lstm = name("torch.nn.modules.rnn", "LSTM")
    weights = b"](](K\x00ee"
    archive(file, module(lstm, num_layers=number(10**12), _all_weights=weights, bias=TRUE))


def one_state_for_a_million_modules(file: Path) -> None:
    """Each BUILD copies the same large dictionary."""
    state = mapping({f"k{i}": NONE for i in range(20_000)}) + b"q\x00"
    made = (SEQUENTIAL + b")\x81h\x00b") * 20_000
    archive(file, b"](" + state + made + b"e")


def one_text_encoded_again_and_again(file: Path) -> None:
    args = several(text("x" * 2**20), text("latin1")) + b"q\x00"
    calls = (name("_codecs", "encode") + b"h\x00R") * 10_000
    archive(file, b"](" + args + calls + b"e")


def a_pickle_of_three_million_steps(file: Path) -> None:
    archive(file, b"](" + b"N" * 3_000_000 + b"e")


def a_pickle_of_64_megabytes(file: Path) -> None:
    archive(file, text("x" * 2**26))


def a_dictionary_key_nested_100_000_deep(file: Path) -> None:
    archive(file, b"}" + b")" + b"\x85" * 100_000 + b"Ns")


BOMBS = [
    (a_deflate_bomb, "is compressed"),
    (an_8_gb_bytearray, "asks for 8,589,934,592 bytes"),
    (an_8_gb_bytearray_as_in_python_2, "asks for 8,589,934,592 bytes"),
    (a_stride_0_tensor, "asks for 1,000,000,000,000 elements"),
    (a_stride_0_tensor_of_strange_type, "asks for 1,000,000,000,000 elements"),
    (a_tensor_beyond_its_storage, "asks for 4 elements, but the file stores 4"),
    (a_tensor_with_wide_strides, "asks for 4 elements, but the file stores 4"),
    (a_storage_larger_than_its_entry, "asks for 4,398,046,511,104 bytes"),
    (many_views_of_one_storage, "tensors take 26,214,400 bytes together"),
    (a_linear_layer_made_by_a_call, r"calls torch\.nn\.modules\.linear\.Linear"),
    (a_tensor_made_by_a_call, r"uses torch\.FloatTensor"),
    (an_untyped_storage_made_by_a_call, r"calls torch\.storage\.UntypedStorage"),
    (a_sparse_tensor_of_10_to_the_15, "spans 1,000,000,000,000,000 elements"),
    (an_lstm_of_10_to_the_12_layers, "asks for 1000000000000 recurrent layers"),
    (one_state_for_a_million_modules, "far more memory than the file"),
    (one_text_encoded_again_and_again, "far more memory than the file"),
    (a_pickle_of_three_million_steps, "more than 2,000,000 steps"),
    (a_pickle_of_64_megabytes, "data.pkl has"),
    (a_dictionary_key_nested_100_000_deep, "ordinary model files never hold"),
]


@pytest.mark.parametrize(("make", "match"), BOMBS, ids=[case[0].__name__ for case in BOMBS])
def test_bombs_are_refused_before_torch_reads_them(
    file: Path, make: Callable[[Path], None], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(file)

    def unexpected(*args: Any, **options: Any) -> Any:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", unexpected)
    refused(file, UnsafeFileError, match)


# Cases 13 to 15


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_another_pickle_protocol(file: Path, tiny: nn.Module, protocol: int) -> None:
    saved(tiny, file, pickle_protocol=protocol)
    error = refused(file, UnreadableFileError, f"it uses pickle protocol {protocol}")
    assert "pickle_protocol=2" in str(error.hint) or "default protocol" in str(error.hint)


def test_numpy_scalars_in_a_training_checkpoint(file: Path, tiny: nn.Module, models: Any) -> None:
    numbers = [np.float64(0.93), np.float32(1), np.int64(7), np.bool_(True), np.float16(0.5)]
    saved({"state_dict": tiny.state_dict(), "best": numbers}, file)
    loaded = load_model(file, models=models, arch="tiny")
    assert torch.equal(loaded.model.head.weight, tiny.head.weight)


def test_a_numpy_object_is_refused(file: Path) -> None:
    dtype = called(name("numpy", "dtype"), text("O8"), FALSE, TRUE)
    scalar = called(name("numpy.core.multiarray", "scalar"), dtype, text("x"))
    refused(archive(file, mapping({"a": scalar})), UnsafeFileError, "not a plain number")


def test_numpys_own_dtype_cannot_be_changed(file: Path) -> None:
    """Without copy=True, the state would be set on the dtype that all arrays share."""
    dtype = called(name("numpy", "dtype"), text("f8"), FALSE, FALSE)
    refused(archive(file, mapping({"a": dtype})), UnreadableFileError, "make no sense")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive(file: Path, tiny: nn.Module) -> None:
    torch.jit.save(torch.jit.trace(tiny, torch.zeros(1, 1, 8, 8)), file)
    refused(file, UnreadableFileError, "is a TorchScript archive")
    refused(file, UnreadableFileError, "is a TorchScript archive", unsafe=True)


def test_an_exported_program(tmp_path: Path, tiny: nn.Module) -> None:
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(tiny, (torch.zeros(1, 1, 8, 8),)), file)
    refused(file, UnreadableFileError, "is an exported program")


# Case 16: code


class Attack:
    """Runs a shell command when it is unpickled, as any file from the internet may."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class EvalAttack(Attack):
    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.canary)!r}, 'w').close()",)


class PopenAttack(Attack):
    def __reduce__(self) -> Any:
        return subprocess.call, (["touch", str(self.canary)],)


def at_top_level(attack: Any) -> Any:
    return attack


def in_a_submodule(attack: Any) -> Any:
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["1"] = attack
    return model


def in_forward_hooks(attack: Any) -> Any:
    model = nn.Linear(2, 2)
    model._forward_hooks[0] = attack
    return model


def in_buffers(attack: Any) -> Any:
    model = nn.Linear(2, 2)
    model._buffers["b"] = attack
    return model


def in_an_attribute(attack: Any) -> Any:
    model = nn.Linear(2, 2)
    model.note = [{"deep": (attack,)}]
    return model


def in_a_training_checkpoint(attack: Any) -> Any:
    return {"state_dict": nn.Linear(2, 2).state_dict(), "args": attack}


def in_state_dict_metadata(attack: Any) -> Any:
    state = nn.Linear(2, 2).state_dict()
    state._metadata["x"] = attack
    return state


def in_a_parameter_attribute(attack: Any) -> Any:
    model = nn.Linear(2, 2)
    model.weight.note = attack
    return model


PLACES = [
    at_top_level,
    in_a_submodule,
    in_forward_hooks,
    in_buffers,
    in_an_attribute,
    in_a_training_checkpoint,
    in_state_dict_metadata,
    in_a_parameter_attribute,
]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("attack", [Attack, EvalAttack, PopenAttack])
@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}], ids=["zip", "protocol-4"])
def test_code_never_runs(
    file: Path, canary: Path, place: Callable[[Any], Any], attack: type[Attack], options: Any
) -> None:
    saved(place(attack(canary)), file, **options)
    refused(file, UnsafeFileError, "reading it could run code")
    with pytest.raises(UnsafeFileError, match="reading it could run code"):
        load_into(nn.Linear(2, 2), file)
    assert not canary.exists()


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_code_never_runs_from_the_old_format(
    file: Path, canary: Path, place: Callable[[Any], Any]
) -> None:
    saved(place(Attack(canary)), file, _use_new_zipfile_serialization=False)
    refused(file, UnsafeFileError, "reading it could run code")
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_code_never_runs_from_a_plain_pickle(file: Path, canary: Path, protocol: int) -> None:
    file.write_bytes(pickle.dumps(Attack(canary), protocol=protocol))
    with pytest.raises(TdkitError, match=r"model\.pt"):
        load_model(file, models={})
    assert not canary.exists()


@pytest.mark.parametrize(
    "variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
)
def test_the_environment_does_not_weaken_it(
    file: Path, canary: Path, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 81, for both lines of defence."""
    monkeypatch.setenv(variable, "1")
    saved(in_a_submodule(Attack(canary)), file)
    refused(file, UnsafeFileError, "reading it could run code")
    monkeypatch.setattr(contents_module, "scan", lambda *_: Scan(None, {}, False, {}))
    refused(file, UnreadableFileError, "cannot be read: UnpicklingError")
    assert not canary.exists()


def test_torch_is_a_second_line_of_defence(
    file: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(Attack(canary), file)
    monkeypatch.setattr(contents_module, "scan", lambda *_: Scan(None, {}, False, {}))
    refused(file, UnreadableFileError, r"cannot be read: UnpicklingError: .*posix")
    assert not canary.exists()


def test_the_one_flag_runs_code(file: Path, canary: Path) -> None:
    """The attack is real, and unsafe means what it says."""
    saved(in_an_attribute(Attack(canary)), file)
    loaded = load_model(file, models={}, unsafe=True)
    assert canary.exists()
    assert any("unsafe" in note for note in loaded.notes)


def test_the_flag_does_not_waive_the_checksum(file: Path, canary: Path) -> None:
    saved(Attack(canary), file)
    data = bytearray(file.read_bytes())
    data[data.index(b"touch")] ^= 1
    file.write_bytes(data)
    refused(file, UnreadableFileError, "is damaged", unsafe=True)


def test_every_unknown_name_is_in_one_message(file: Path) -> None:
    value = several(
        name("mynet", "A"), name("mynet.blocks", "B"), name("other", "C"), name("d", "E")
    )
    error = refused(
        archive(file, value), UnsafeFileError, r"mynet\.A, mynet\.blocks\.B, other\.C and 1"
    )
    names = ["mynet:A", "mynet.blocks:B", "other:C", "d:E"]
    yours = "if the file and this code are yours: "
    assert f"{yours}allow_classes={names}; or " in str(error.hint)
    with spelled(ShellSpelling()):
        error = refused(archive(file, value), UnsafeFileError, "uses mynet")
    assert f"{yours}{' '.join(f'--allow-class {name}' for name in names)}; or " in str(error.hint)


def test_a_file_cannot_make_the_message_endless(file: Path) -> None:
    value = several(*(name("mynet", f"A{i}") for i in range(300)))
    error = refused(archive(file, value), UnsafeFileError, "and 297 more")
    assert len(str(error.hint)) < 2000


@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["argparse Namespace"], "not on tdkit's list", "allow_classes=['argparse:Namespace']"),
        (["builtins slice"], "not on tdkit's list", "save the state_dict alone"),
        (["numpy ndarray"], "not on tdkit's list", "save the state_dict alone"),
        (["torch._dynamo.eval_frame X", "builtins id"], "could run code", "model._orig_mod"),
        (["torch.nn.modules.linear LazyLinear"], "not on tdkit's list", "run the model once"),
        (["torch.nn.utils.prune L1"], "not on tdkit's list", "prune.remove"),
        (["builtins exec"], "could run code", "do not trust it"),
        (["posix system"], "could run code", "do not trust it"),
        (["importlib.util find_spec"], "could run code", "do not trust it"),
    ],
)
def test_the_next_step_fits_the_names(
    file: Path, names: list[str], message: str, hint: str
) -> None:
    value = several(*(name(*text.split()) for text in names))
    error = refused(archive(file, value), UnsafeFileError, message)
    assert hint in str(error.hint)
    assert ("allow_classes" in str(error.hint)) is ("argparse Namespace" in names)


def test_names_cannot_write_to_the_terminal(file: Path) -> None:
    evil = name("my\x1b[2Jnet", "A\r\x07")
    refused(archive(file, evil), UnsafeFileError, r"my\\x1b\[2Jnet")


@pytest.mark.parametrize(
    "path",
    [
        ("torch.hub", "load"),
        ("torch", "load"),
        ("torch.jit", "load"),
        ("torch.nn.modules.container", "OrderedDict"),
        ("torch.nn.modules.linear", "math"),
        ("torch.nn", "os"),
        ("torchvision.models", "resnet18"),
        ("torchvision.models.resnet", "resnet18"),
        ("torch.fx.graph_module", "GraphModule"),
        ("torch.nn.modules.lazy", "LazyModuleMixin"),
        ("torch.nn.modules.linear.Linear", "forward"),
        ("torch.nn.modules.linear", "Linear.forward"),
        ("torch", "_C"),
        ("torch", "from_file"),
        ("builtins", "getattr"),
    ],
    ids="-".join,
)
def test_the_list_is_no_prefix(file: Path, path: tuple[str, str]) -> None:
    """Neighbours of allowed names, and what modules of allowed classes import, stay out."""
    refused(archive(file, mapping({"a": name(*path)})), UnsafeFileError, "uses ")


# Case 17: two files in one


def a_pickle_with_a_zip_behind_it(file: Path, whole: bytes) -> None:
    file.write_bytes(pickle.dumps({"a": 1}, protocol=2) + whole)


def a_safetensors_file_with_a_zip_behind_it(file: Path, whole: bytes) -> None:
    file.write_bytes(safetensors.torch.save({"a": torch.zeros(2)}) + whole)


def a_zip_behind_a_zip(file: Path, whole: bytes) -> None:
    file.write_bytes(whole + whole)


def bytes_behind_the_zip(file: Path, whole: bytes) -> None:
    file.write_bytes(whole + b"\x80\x02N.")


def a_comment_behind_the_zip(file: Path, whole: bytes) -> None:
    file.write_bytes(whole)
    with zipfile.ZipFile(file, "a") as target:
        target.comment = b"\x80\x02N."


def bytes_between_the_entries(file: Path, whole: bytes) -> None:
    """Python's writer leaves a gap when the position is moved by hand."""
    with file.open("wb") as handle, zipfile.ZipFile(handle, "w") as target:
        target.writestr("archive/data.pkl", pickled(module()))
        handle.seek(100, os.SEEK_CUR)
        target.start_dir = handle.tell()
        target.writestr("archive/version", b"3\n")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def two_entries_of_one_name(file: Path, whole: bytes) -> None:
    with zipfile.ZipFile(file, "w") as target:
        for value in (module(), NONE):
            target.writestr("archive/data.pkl", pickled(value))


def bytes_before_the_directory(file: Path, whole: bytes) -> None:
    with file.open("wb") as handle, zipfile.ZipFile(handle, "w") as target:
        target.writestr("archive/data.pkl", pickled(module()))
        handle.seek(100, os.SEEK_CUR)
        target.start_dir = handle.tell()


def two_entries_that_differ_in_case(file: Path, whole: bytes) -> None:
    archive(file, module(), {"DATA.PKL": pickled(NONE)})


POLYGLOTS = [
    (a_pickle_with_a_zip_behind_it, "two files in one"),
    (a_safetensors_file_with_a_zip_behind_it, "two files in one"),
    (a_zip_behind_a_zip, "hides bytes between"),
    (bytes_behind_the_zip, "goes on after the end"),
    (a_comment_behind_the_zip, "goes on after the end"),
    (bytes_between_the_entries, "hides bytes between"),
    (bytes_before_the_directory, "hides bytes between"),
    (two_entries_of_one_name, "two entries of one name"),
    (two_entries_that_differ_in_case, "two entries of one name"),
]


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(("make", "match"), POLYGLOTS, ids=[case[0].__name__ for case in POLYGLOTS])
def test_polyglots(file: Path, make: Callable[[Path, bytes], None], match: str) -> None:
    buffer = io.BytesIO()
    torch.save(nn.Linear(2, 2), buffer)
    make(file, buffer.getvalue())
    refused(file, UnsafeFileError, match)


@pytest.mark.parametrize(("stored", "size"), [(16, 2**30), (8, 16), (2**30, 16)])
def test_an_entry_that_lies_about_its_size(file: Path, stored: int, size: int) -> None:
    archive(file, mapping({"a": tensor()}))
    data = file.read_bytes()
    position = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/0"))
    sizes = struct.pack("<2L", stored, size)
    file.write_bytes(data[: position + 20] + sizes + data[position + 28 :])
    refused(file, UnsafeFileError, "hides bytes between")


# Case 18


def header(text: bytes, behind: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + behind


HEADERS = {
    "longer-than-the-file": struct.pack("<Q", 2**40) + b'{"a": 1}',
    "not-json": header(b"{" * 64),
    "no-tensor": header(b'{"a":{"dtype":"F32"}}'),
    "unknown-dtype": header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "beyond-the-end": header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', bytes(4)),
    "overlapping": header(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "huge-shape": header(
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'
    ),
    "bytes-behind": header(b"{}", bytes(100)),
}


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS.keys())
def test_a_bad_safetensors_header(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    refused(file, UnreadableFileError, "safetensors")


def test_something_else_called_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(200, 256)) * 9)
    refused(file, UnreadableFileError, "no valid safetensors header")


# Case 21


def test_a_class_that_is_not_installed(file: Path) -> None:
    archive(file, module(name("their_package.nets", "TheirNet")))
    error = refused(file, UnsafeFileError, r"uses their_package\.nets\.TheirNet")
    assert "allow_classes=['their_package.nets:TheirNet']" in str(error.hint)
    with pytest.raises(UsageError, match="No module named 'their_package'"):
        load_model(file, models={}, allow_classes=["their_package.nets:TheirNet"])


def test_a_class_of_another_version_of_torchvision(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.models.resnet

    saved(torchvision.models.resnet.BasicBlock(4, 4), file)
    monkeypatch.delattr(torchvision.models.resnet, "BasicBlock")
    error = refused(file, UnreadableFileError, "which the installed torchvision lacks")
    assert "version" in str(error.hint)


# Case 22, and forged objects


def with_instance_forward() -> bytes:
    return module(forward=name("torch.nn.functional", "relu"))


def with_forward_in_a_submodule() -> bytes:
    return module(_modules=ordered({"0": with_instance_forward()}))


def with_a_replaced_call() -> bytes:
    return module(_call_impl=name("torch.nn.functional", "relu"))


def with_a_compiled_call() -> bytes:
    return module(_compiled_call_impl=name("torch.nn.functional", "relu"))


def with_a_replaced_train() -> bytes:
    return module(train=NONE)


def with_forward_hooks() -> bytes:
    return module(_forward_hooks=ordered({"0": name("torch.nn.functional", "relu")}))


def with_hooks_in_a_list_of_modules() -> bytes:
    return module(layers=b"](" + with_forward_hooks() + b"e")


def with_forward_behind_a_dictionary() -> bytes:
    return module(layers=mapping({"a": several(with_instance_forward())}))


def with_data_parallel_that_hides_its_module() -> bytes:
    parallel = name("torch.nn.parallel.data_parallel", "DataParallel")
    return module(parallel, module=with_instance_forward(), _modules=ordered({"module": module()}))


def with_load_hooks() -> bytes:
    hooks = ordered({"0": name("torch.nn.functional", "relu")})
    return module(_load_state_dict_post_hooks=hooks)


METHODS = [
    (with_instance_forward, "replaces its method forward"),
    (with_forward_in_a_submodule, r"module 0 \(Sequential\) replaces its method forward"),
    (with_a_replaced_call, "replaces its method _call_impl"),
    (with_a_compiled_call, "carries hooks"),
    (with_a_replaced_train, "replaces its method train"),
    (with_forward_hooks, "carries hooks"),
    (with_load_hooks, "carries hooks"),
    (with_hooks_in_a_list_of_modules, r"in an attribute \(Sequential\) carries hooks"),
    (with_forward_behind_a_dictionary, "in an attribute .* replaces its method forward"),
    (with_data_parallel_that_hides_its_module, "in an attribute .* replaces its method forward"),
]


@pytest.mark.parametrize(("make", "match"), METHODS, ids=[case[0].__name__ for case in METHODS])
def test_methods_and_hooks_from_the_file(file: Path, make: Callable[[], bytes], match: str) -> None:
    refused(archive(file, make()), UnsafeFileError, match)


def a_parameter_that_is_a_text() -> bytes:
    return module(_parameters=ordered({"weight": text("x")}))


def a_buffer_that_is_a_class() -> bytes:
    return module(_buffers=ordered({"b": CONV}))


def parameters_in_a_counter() -> bytes:
    return module(_parameters=called(name("collections", "Counter")))


def a_submodule_that_is_a_list() -> bytes:
    return module(_modules=ordered({"0": b"]"}))


def submodules_that_are_a_number() -> bytes:
    return module(_modules=number(3))


def no_tables_at_all() -> bytes:
    return SEQUENTIAL + b")\x81}b"


def no_state_at_all() -> bytes:
    return SEQUENTIAL + b")\x81"


def a_name_with_a_dot() -> bytes:
    return module(_modules=ordered({"a.b": module()}))


def a_convolution_without_stride() -> bytes:
    return module(CONV, in_channels=number(1))


def _convolution(**changed: bytes) -> bytes:
    one = several(number(1), number(1))
    state = {
        "in_channels": number(1),
        "out_channels": number(4),
        "groups": number(1),
        "kernel_size": one,
        "stride": one,
        "padding": one,
        "dilation": one,
        "output_padding": one,
        "padding_mode": text("zeros"),
        "_parameters": ordered(
            {"weight": _parameter(tensor((4, 1, 1, 1), (1, 1, 1, 1))), "bias": NONE}
        ),
    }
    return module(CONV, **{**state, **changed})


def _parameter(value: bytes) -> bytes:
    return called(name("torch._utils", "_rebuild_parameter"), value, TRUE, ORDERED)


def a_convolution_with_text_for_stride() -> bytes:
    return _convolution(stride=text("1"))


def a_convolution_with_half_a_stride() -> bytes:
    return _convolution(stride=several(number(1), b"G" + struct.pack(">d", 0.5)))


def a_convolution_with_no_groups() -> bytes:
    return _convolution(groups=number(0))


def a_convolution_with_another_shape() -> bytes:
    return _convolution(in_channels=number(2))


def a_convolution_with_unknown_padding_mode() -> bytes:
    return _convolution(padding_mode=text("evil"))


FORGED = [
    (a_parameter_that_is_a_text, "is not a parameter"),
    (a_buffer_that_is_a_class, "is not a tensor"),
    (parameters_in_a_counter, "lacks the _parameters"),
    (a_submodule_that_is_a_list, "is not a module"),
    (submodules_that_are_a_number, "cannot be read: TypeError"),
    (no_tables_at_all, "lacks the _?[a-z_]+ that every module has"),
    (no_state_at_all, "lacks the _?[a-z_]+ that every module has"),
    (a_name_with_a_dot, "not names"),
    (a_convolution_without_stride, "lacks what such a layer has"),
    (a_convolution_with_text_for_stride, "its stride is not 2 numbers"),
    (a_convolution_with_half_a_stride, "its stride is not 2 numbers"),
    (a_convolution_with_no_groups, "groups are not positive"),
    (a_convolution_with_another_shape, r"shape \(4, 1, 1, 1\), not \(4, 2, 1, 1\)"),
    (a_convolution_with_unknown_padding_mode, "padding mode"),
]


def test_the_unforged_convolution_loads(file: Path) -> None:
    loaded = load_model(archive(file, _convolution()), models={})
    assert loaded.model(torch.ones(1, 1, 1, 1)).shape == (1, 4, 3, 3)


@pytest.mark.parametrize(("make", "match"), FORGED, ids=[case[0].__name__ for case in FORGED])
def test_forged_modules(file: Path, make: Callable[[], bytes], match: str) -> None:
    refused(archive(file, make()), UnreadableFileError, match)


def setstate_in_the_state() -> bytes:
    return module(__setstate__=name("torch.nn.functional", "relu"))


def a_state_that_is_a_list() -> bytes:
    return SEQUENTIAL + b")\x81]b"


def two_states() -> bytes:
    return module() + b"}b"


def hooks_on_a_tensor() -> bytes:
    return mapping({"a": tensor(hooks=ordered({"0": name("torch.nn.functional", "relu")}))})


def hooks_put_on_a_tensor_later() -> bytes:
    later = b"h\x07(" + text("0") + name("torch.nn.functional", "relu") + b"u0"
    return b"](" + tensor(hooks=ORDERED + b"q\x07") + later.replace(b"u0", b"u") + b"e"


def attributes_of_an_ordered_dictionary() -> bytes:
    return ORDERED + mapping({"items": name("torch.nn.functional", "relu")}) + b"b"


def methods_of_a_parameter() -> bytes:
    function = name("torch._utils", "_rebuild_parameter_with_state")
    state = mapping({"numel": name("torch.nn.functional", "relu")})
    return mapping({"a": called(function, tensor(), TRUE, ORDERED, state)})


def a_text_in_the_place_of_a_method_of_a_parameter() -> bytes:
    function = name("torch._utils", "_rebuild_parameter_with_state")
    state = mapping({"numel": text("x")})
    return mapping({"a": called(function, tensor(), TRUE, ORDERED, state)})


def a_call_through_rebuild_from_type() -> bytes:
    function = name("torch._tensor", "_rebuild_from_type_v2")
    linear = name("torch.nn.modules.linear", "Linear")
    args = several(number(9), number(9))
    return mapping({"a": called(function, linear, name("torch", "Tensor"), args, b"}")})


def a_call_of_a_module() -> bytes:
    return module() + b")R"


def a_call_of_an_activation() -> bytes:
    return mapping({"a": called(name("torch.nn.functional", "relu"), tensor())})


def a_partial_of_its_own_choosing() -> bytes:
    partial = name("functools", "partial")
    return mapping({"a": called(partial, name("torch._utils", "_rebuild_tensor_v2"))})


def a_persistent_object() -> bytes:
    return several(text("evil"), text("x")) + b"Q"


def new_with_arguments() -> bytes:
    return CONV + several(number(9), number(9), number(9)) + b"\x81"


TRICKS = [
    (setstate_in_the_state, "a state that does not belong"),
    (a_state_that_is_a_list, "a state that does not belong"),
    (two_states, "ordinary model files never hold"),
    (hooks_on_a_tensor, "carries hooks"),
    (hooks_put_on_a_tensor_later, "ordinary model files never hold"),
    (attributes_of_an_ordered_dictionary, "ordinary model files never hold"),
    (methods_of_a_parameter, "attributes that tdkit does not trust"),
    (a_text_in_the_place_of_a_method_of_a_parameter, "attributes that tdkit does not trust"),
    (a_call_through_rebuild_from_type, "makes a tensor of the class"),
    (a_call_of_a_module, "calls something that is not a function"),
    (a_call_of_an_activation, r"calls torch\.nn\.functional\.relu"),
    (a_partial_of_its_own_choosing, r"calls functools\.partial"),
    (a_persistent_object, "not in it"),
    (new_with_arguments, "arguments of its own choosing"),
]


@pytest.mark.parametrize(("make", "match"), TRICKS, ids=[case[0].__name__ for case in TRICKS])
def test_pickle_tricks(file: Path, make: Callable[[], bytes], match: str) -> None:
    refused(archive(file, make()), UnsafeFileError, match)


# Case 23


def _cycle() -> nn.Module:
    model = nn.Sequential(nn.Sequential())
    model[0]._modules["0"] = model
    return model


def _deep() -> nn.Module:
    model: nn.Module = nn.ReLU()
    for _ in range(150):
        model = nn.Sequential(model)
    return model


def _doubling() -> nn.Module:
    """Forty modules that stand in a million million places."""
    model: nn.Module = nn.ReLU()
    for _ in range(40):
        model = nn.Sequential(model, model)
    return model


@pytest.mark.parametrize("make", [_cycle, _deep, _doubling])
def test_modules_that_are_no_tree(file: Path, make: Callable[[], nn.Module]) -> None:
    refused(saved(make(), file), UnsupportedError, "contains itself, nests more than 100 deep")


# The format from before torch 1.6


def old(value: Any, file: Path) -> Path:
    return saved(value, file, _use_new_zipfile_serialization=False)


def test_an_old_whole_model(file: Path, tiny: nn.Module) -> None:
    refused(old(tiny, file), UnreadableFileError, "from before torch 1.6")


@pytest.mark.parametrize("cut", [3, 20, 200])
def test_an_old_file_cut_short(file: Path, tiny: nn.Module, cut: int) -> None:
    old(tiny.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-cut])
    refused(file, UnreadableFileError, "more than its .* bytes hold")


def test_an_old_file_that_asks_for_more_than_it_holds(file: Path) -> None:
    old({"a": torch.zeros(4)}, file)
    data = file.read_bytes()
    assert data.count(b"K\x04N") == 1
    file.write_bytes(data.replace(b"K\x04N", b"J\0\0\0\x7fN"))
    refused(file, UnsafeFileError, "asks for 8,522,825,728 bytes")


def test_an_old_file_with_bytes_behind(file: Path) -> None:
    old({"a": torch.zeros(4)}, file)
    file.write_bytes(file.read_bytes() + b"x")
    refused(file, UnsafeFileError, "goes on for 1 bytes")


# What the user allows


REFUSED_CLASSES = [
    ("os:system", "builtin_function_or_method, not a class"),
    ("builtins:eval", "builtin_function_or_method, not a class"),
    ("subprocess:Popen", "runs code of its own"),
    ("pathlib:Path", "runs code of its own"),
    ("os:environ", "not a class"),
    ("os.system", "does not have the form package.module:name"),
    ("os:", "does not have the form package.module:name"),
    ("__import__('os'):x", "does not have the form package.module:name"),
    ("os:nothing", "os has no nothing"),
]


@pytest.mark.parametrize(("text", "match"), REFUSED_CLASSES, ids=[c[0] for c in REFUSED_CLASSES])
def test_allow_class_takes_no_functions(file: Path, text: str, match: str) -> None:
    saved({"a": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match=match):
        load_model(file, models={}, allow_classes=[text])


def test_an_allowed_class_cannot_be_called(file: Path) -> None:
    """The file may hold objects of the class; it may not run its constructor."""
    cls = name("argparse", "Namespace")
    allowed = ["argparse:Namespace"]
    archive(file, called(cls))
    refused(file, UnsafeFileError, r"calls argparse\.Namespace", allow_classes=allowed)


def test_loading_leaves_torchs_list_alone(file: Path, tiny: nn.Module) -> None:
    saved(tiny, file)
    with torch.serialization.safe_globals([nn.Linear]):
        before = set(torch.serialization.get_safe_globals())
        load_model(file, models={})
        assert set(torch.serialization.get_safe_globals()) == before


def test_a_dangerous_name_in_torchs_own_list_does_not_help(file: Path, canary: Path) -> None:
    saved(PopenAttack(canary), file)
    with torch.serialization.safe_globals([subprocess.call]):
        refused(file, UnsafeFileError, r"uses subprocess\.call")
    assert not canary.exists()


# What tdkit itself stores is believed no more than the rest


def _described(file: Path, description: str) -> Path:
    return saved({"state_dict": {"conv1.0.weight": torch.zeros(4)}, "tdkit": description}, file)


SPEC = '{"kind": "Conv2d", "in_channels": 1, "out_channels": %s, "kernel_size": [3, 3], "stride":'
SPEC += ' [1, 1], "padding": [1, 1], "dilation": [1, 1], "output_padding": [0, 0]}'
FRAME = '{"version": 1, "arch": "tiny", "arch_options": %s, "structure": %s, "input_shape": %s}'

DESCRIPTIONS = [
    ("no-json", "{", UnreadableFileError, "is not JSON"),
    ("nested-json", "[" * 100_000, UnreadableFileError, "is not JSON"),
    ("a-list", "[]", UnreadableFileError, "is not a JSON object"),
    ("version", '{"version": 99}', UnreadableFileError, "has the version 99"),
    ("no-structure", FRAME % ("{}", "3", "null"), UnreadableFileError, "describes no layers"),
    (
        "kind",
        FRAME % ("{}", '{"conv1": [{"kind": {}}]}', "null"),
        UnreadableFileError,
        "unknown way",
    ),
    (
        "kind-that-nothing-provides",
        FRAME % ("{}", '{"conv1": [{"kind": "os.system"}]}', "null"),
        UnreadableFileError,
        "by stages of the kind os.system, which nothing here provides",
    ),
    (
        "negative-sizes",
        FRAME % ("{}", '{"conv1": [{"kind": "Unflatten", "dim": 1, "sizes": [-1]}]}', "null"),
        UnreadableFileError,
        "describes conv1 wrongly: its sizes",
    ),
    (
        "huge-sizes",
        FRAME % ("{}", '{"conv1": [{"kind": "Unflatten", "dim": 1, "sizes": [%s]}]}' % 2**40, "{}"),
        UnreadableFileError,
        "describes conv1 wrongly: its sizes",
    ),
    (
        "no-permutation",
        FRAME % ("{}", '{"conv1": [{"kind": "Permute", "dims": [0, 9]}]}', "null"),
        UnreadableFileError,
        "describes conv1 wrongly: its dims",
    ),
    (
        "no-axis",
        FRAME % ("{}", '{"conv1": [{"kind": "Flatten", "start": 0, "end": 99}]}', "null"),
        UnreadableFileError,
        "describes conv1 wrongly: its axes",
    ),
    (
        "no-groups",
        FRAME % ("{}", '{"conv1": [{"kind": "ChannelShuffle", "groups": 0}]}', "null"),
        UnreadableFileError,
        "describes conv1 wrongly: its groups",
    ),
    (
        "weights-for-a-move",
        FRAME % ("{}", '{"conv1": [{"kind": "ChannelShuffle", "groups": 2}]}', "null"),
        UnreadableFileError,
        "does not fit tiny",
    ),
    ("no-stages", FRAME % ("{}", '{"conv1": []}', "null"), UnreadableFileError, "nothing"),
    (
        "huge-layer",
        FRAME % ("{}", '{"conv1": [%s]}' % (SPEC % 2**30), "null"),
        UnreadableFileError,
        "does not fit tiny",
    ),
    (
        "negative-layer",
        FRAME % ("{}", '{"conv1": [%s]}' % (SPEC % -4), "null"),
        UnreadableFileError,
        "not positive numbers",
    ),
    (
        "unknown-layer",
        FRAME % ("{}", '{"conv9": [%s]}' % (SPEC % 4), "null"),
        UnreadableFileError,
        "does not have",
    ),
    (
        "many-classes",
        FRAME % ('{"num_classes": 1000000000}', "{}", "null"),
        UnreadableFileError,
        "asks for 1000000000 channels or classes",
    ),
    ("option", FRAME % ('{"root": 3}', "{}", "null"), UnreadableFileError, "options that no"),
    (
        "input",
        FRAME % ("{}", "{}", "[3, 99999, 99999]"),
        UnreadableFileError,
        "input shape that no",
    ),
    (
        "foreign-arch",
        '{"version": 1, "arch": "os:abort", "arch_options": {}, "structure": {}}',
        UsageError,
        "does not import on a file's word",
    ),
    (
        "unknown-arch",
        '{"version": 1, "arch": "someones-net", "arch_options": {}, "structure": {}}',
        UsageError,
        "is not a registered model here",
    ),
]


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [case[1:] for case in DESCRIPTIONS],
    ids=[case[0] for case in DESCRIPTIONS],
)
def test_forged_descriptions(
    file: Path, models: Any, text: str, error: type[TdkitError], match: str
) -> None:
    _described(file, text)
    with pytest.raises(error, match=match) as caught:
        load_model(file, models=models)
    assert caught.value.hint


def test_forged_metadata_of_a_state_dict(file: Path, tiny: nn.Module, models: Any) -> None:
    state = tiny.state_dict()
    state._metadata = 3
    loaded = load_model(saved(state, file), models=models)
    assert loaded.arch == "tiny"


def test_a_description_of_17_megabytes(file: Path, models: Any) -> None:
    header = {"a": torch.zeros(1)}
    safetensors.torch.save_file(header, file, metadata={"tdkit": " " * 17_000_000})
    with pytest.raises(UnreadableFileError, match="has 17,000,000 characters"):
        load_model(file, models=models)


def test_nothing_is_left_of_an_attack_in_a_fresh_process(file: Path, canary: Path) -> None:
    """The same in the way users meet it, with the environment variable set."""
    saved(in_a_submodule(Attack(canary)), file)
    code = f"from tdkit.checkpoint import load_model; load_model({str(file)!r}, models={{}})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UnsafeFileError" in done.stderr
    assert not canary.exists()


def test_state_dict_of_ordered_pairs_as_in_python_2(file: Path) -> None:
    pairs = b"](](" + text("a") + tensor() + b"ee"
    archive(file, called(name("collections", "OrderedDict"), pairs))
    refused(file, UsageError, "fits no registered model")


def test_ordered_dict_is_what_a_state_dict_is(file: Path) -> None:
    saved(OrderedDict(a=torch.zeros(1)), file)
    refused(file, UsageError, "fits no registered model")
