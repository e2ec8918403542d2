"""A model's loadledger.toml, as it is and as it may be meant to do harm."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import models

from runtime.errors import InvalidModelId
from runtime.repository import (
    DEFAULTS_FILE,
    MAX_DEFAULTS_BYTES,
    InvalidDefaults,
    Repository,
    WarmUp,
    read_defaults,
    read_warm_up,
)
from runtime.wire import Tensor


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a repository with the model `m`, and a file outside of it."""
    models.save(models.add(), tmp_path / "models", "m")
    (tmp_path / "outside.toml").write_text("instances = 2")
    return tmp_path / "models"


def write(root: Path, content: bytes) -> Repository:
    (root / "m" / DEFAULTS_FILE).write_bytes(content)
    return Repository(root)


def refusal(repository: Repository) -> str:
    with pytest.raises(InvalidDefaults) as refused:
        read_defaults(repository, "m")
    with pytest.raises(InvalidDefaults, match=re.escape(str(refused.value))):
        read_warm_up(repository, "m")
    assert str(refused.value).startswith(("m/loadledger.toml ", "m/loadledger.toml: "))
    assert str(repository.root) not in str(refused.value)
    return str(refused.value)


def test_defaults_are_read_each_time(root: Path) -> None:
    repository = Repository(root)
    assert read_defaults(repository, "m") == {}
    write(root, b"# why\ntimeout_s = 5\ninstances = 2\nnonsense = [1, 'x']\n")
    assert read_defaults(repository, "m") == {"timeout_s": 5, "instances": 2, "nonsense": [1, "x"]}
    write(root, b"instances = 2\n".ljust(MAX_DEFAULTS_BYTES, b"#"))
    assert read_defaults(repository, "m") == {"instances": 2}
    assert [file.path for file in repository.stat_version("m", 1)] == ["model.onnx"]  # it is in no version
    assert repository.versions("m") == [1]
    (root / "shared.toml").write_text("instances = 3")
    (root / "m" / DEFAULTS_FILE).unlink()
    (root / "m" / DEFAULTS_FILE).symlink_to("../shared.toml")
    assert read_defaults(repository, "m") == {"instances": 3}
    with pytest.raises(InvalidModelId):
        read_defaults(repository, "..")


INPUT = b"[[warm_up.inputs]]\nname = 'x'\ndatatype = 'INT64'\nshape = [2, 1]\ndata = %s\n"


def test_warm_up_input_takes_many_fractions(root: Path) -> None:
    data = b"[" + b"-0.5,+1.25e-3, 1_0.0 ,\n2.0 " * 1000 + b"]"
    data = data.replace(b"2.0 -", b"2.0, -")
    [given] = read_warm_up(write(root, INPUT % data), "m").inputs
    assert bytes(given.data).count(b",") == 3999


def test_warm_up_can_be_switched(root: Path) -> None:
    assert read_warm_up(Repository(root), "m") == WarmUp(None, ())
    switches = {b"[warm_up]": None, b"warm_up.enabled = true": True, b"warm_up.enabled = false": False}
    for content, enabled in switches.items():
        repository = write(root, b"instances = 2\n" + content)
        assert read_warm_up(repository, "m") == WarmUp(enabled, ())
        assert read_defaults(repository, "m") == {"instances": 2}


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"[1, -2]", b"[1,-2]"),
        (b"[[1], [0x7FFFFFFFFFFFFFFF]]", b"[[1],[9223372036854775807]]"),
        (b"[1.5, 1e300]", b"[1.5,1e+300]"),
        (b"[true, [false]]", b"[true,[false]]"),
        (b'[\'\xc3\xa4\', "\\u0000\\""]', '["ä","\\u0000\\""]'.encode()),
        (b"[]", b"[]"),
    ],
)
def test_warm_up_inputs_are_json_tensors(root: Path, data: bytes, text: bytes) -> None:
    assert read_warm_up(write(root, INPUT % data), "m").inputs == (
        Tensor("x", "INT64", (2, 1), text, text=True),
    )


INVALID: list[tuple[bytes | Callable[[Path], object], str]] = [
    (b"instances 2", "is no TOML"),
    (b"a = 1\na = 2", "is no TOML"),
    (b"\xff = 1", "is not UTF-8"),
    (b"a = " + b"9" * 5_000, "is no TOML"),
    (b"a = " + b"[" * 30_000, "is nested too deeply"),
    (b"a." * 30_000 + b"a = 1", "more than 1000 dots"),
    (b"[" + b"1 ." * 20_000 + b"1]", "more than 1000 dots"),
    (b"a = {" + b'", 1.1,".' * 7_000 + b"a = 1}", "more than 1000 dots"),
    (b"#" * (MAX_DEFAULTS_BYTES + 1), f"has more than {MAX_DEFAULTS_BYTES} bytes"),
    # Not read at all.
    (lambda path: path.symlink_to("../../outside.toml"), "leads out"),
    (lambda path: path.symlink_to("/dev/zero"), "leads out"),
    (lambda path: path.symlink_to("nowhere"), "leads nowhere"),
    (lambda path: path.symlink_to(DEFAULTS_FILE), "cannot be looked at"),
    (os.mkfifo, "is not a regular file"),
    (models.bind_socket, "is not a regular file"),
    (Path.mkdir, "is not a regular file"),
    # Warm-ups, with the key.
    (b"warm_up = true", "m/loadledger.toml: warm_up: Expected `object`"),
    (b"warm_up.enabled = 'yes'", "m/loadledger.toml: warm_up.enabled: Expected `bool`, got `str`"),
    (b"warm_up.on = true", "warm_up: Object contains unknown field `on`"),
    (b"warm_up.inputs = 1", "warm_up.inputs: Expected `array`"),
    (b"warm_up.inputs = [1]", "warm_up.inputs[0]: Expected `object`"),
    (INPUT % b"[1]" + b"datatypes = 1", "warm_up.inputs[0]: Object contains unknown field `datatypes`"),
    (b"[[warm_up.inputs]]\nname = 'x'", "warm_up.inputs[0]: Object missing required field `datatype`"),
    ((INPUT % b"[1]") * 2 + b"x = 1", "warm_up.inputs[1]: "),
    (INPUT % b"1", "warm_up.inputs[0].data: Expected `array`, got `int`"),
    (INPUT % b"[1979-05-27]", "warm_up.inputs[0].data: takes numbers, booleans, strings and lists"),
    (INPUT % b"[[{a = 1}]]", "warm_up.inputs[0].data: takes numbers, booleans, strings and lists"),
    (INPUT % b"[1.0, nan]", "warm_up.inputs[0].data: takes no infinity and no NaN"),
    (INPUT % (b"[0x" + b"f" * 9000 + b"]"), "warm_up.inputs[0].data: has a number that no datatype can hold"),
    (INPUT.replace(b"[2, 1]", b"[-1]") % b"[]", "warm_up.inputs[0].shape[0]: Expected `int` >= 0"),
    (INPUT.replace(b"[2, 1]", b"[0x%s]" % (b"f" * 90)) % b"[]", "warm_up.inputs[0].shape[0]: "),
    (INPUT.replace(b"[2, 1]", b"[true]") % b"[]", "warm_up.inputs[0].shape[0]: Expected `int`"),
    (INPUT.replace(b"[2, 1]", b"[" + b"1," * 65 + b"]") % b"[]", "warm_up.inputs[0].shape: Expected `array`"),
    (INPUT.replace(b"INT64", b"int64") % b"[]", "inputs[0].datatype: 'int64' is no datatype; known: "),
    (INPUT.replace(b"INT64", b"FP16") % b"[]", "warm_up.inputs[0].datatype: FP16 has no form as text"),
    (INPUT.replace(b"'x'", b"'%s'" % (b"x" * 5000)) % b"[]", "warm_up.inputs[0].name: Expected `str` of"),
]


@pytest.mark.parametrize(("content", "words"), INVALID, ids=[words for _, words in INVALID])
def test_invalid_defaults_file_is_refused_with_its_reason(
    root: Path, content: bytes | Callable[[Path], object], words: str
) -> None:
    if isinstance(content, bytes):
        write(root, content)
    else:
        content(root / "m" / DEFAULTS_FILE)
    assert words in refusal(Repository(root))
