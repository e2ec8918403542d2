"""Inputs and outputs of `loadledger infer`: what files become, what is refused, and how results are shown."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image
from support.answers import fill

from answers.inference import ModelMetadata
from answers.tensors import ModelTensor
from loadledger.cli.arrays import ImageOptions, build_inputs, describe_data, result_json, write_arrays
from loadledger.cli.inputs import GivenInput, InputFile, parse_input, read_value
from loadledger.inference import InferenceHead, InferenceResult

AS_DECLARED = ImageOptions()


def tensor(name: str, datatype: str, *shape: int) -> ModelTensor:
    return ModelTensor(name=name, datatype=datatype, shape=list(shape))


def file_of(array: Any, **named: Any) -> InputFile:
    """Return a file of numpy: an array, or with names an archive."""
    content = io.BytesIO()
    if named:
        np.savez(content, **named)
    else:
        np.save(content, array, allow_pickle=True)
    return InputFile("x.npz" if named else "x.npy", content.getvalue())


def picture(
    size: tuple[int, int] = (4, 2), mode: str = "RGB", kind: str = "PNG", colour: Any = None
) -> InputFile:
    """Return a picture of one colour, by default red."""
    content = io.BytesIO()
    Image.new(mode, size, colour if colour is not None else (255, 0, 0)).save(content, kind)
    return InputFile(f"image.{kind.lower()}", content.getvalue())


def built(value: Any, datatype: str, *shape: int, **options: Any) -> tuple[Any, list[str]]:
    """Return what a value becomes for a model's only input, and what is said."""
    notes: list[str] = []
    metadata = fill(ModelMetadata, inputs=[tensor("x", datatype, *shape)])
    given = [GivenInput(None, value)]
    return build_inputs(given, metadata, ImageOptions(**options), notes.append)["x"], notes


# Arguments and files


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("x=[1, 2]", "x", [1, 2]),
        ("a:0=1", "a:0", 1),
        ("[[1]]", None, [[1]]),
        ('["a=b"]', None, ["a=b"]),
        ("5", None, 5),
        ('{"x": [1]}', None, {"x": [1]}),
    ],
)
def test_argument_is_input_with_or_without_name(text: str, name: str | None, value: Any) -> None:
    assert parse_input(text) == GivenInput(name, value)


@pytest.mark.parametrize("text", ["", "=1", "x=", "x=abc", "abc", "[1", "x=@"])
def test_malformed_argument_is_refused_with_example(text: str) -> None:
    with pytest.raises((click.BadParameter, SystemExit), match=r"NAME=|2"):
        parse_input(text)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_file_is_known_by_its_content(kind: str, tmp_path: Path) -> None:
    files = {"is_image": picture(kind=kind), "is_array": file_of([1]), "is_archive": file_of(0, a=1)}
    for is_kind, given in files.items():
        (tmp_path / "file").write_bytes(given.content)
        found = read_value(tmp_path / "file")
        assert (found.content, getattr(found, is_kind)) == (given.content, True)
    (tmp_path / "file").write_text("[1]")
    assert parse_input(f"x=@{tmp_path}/file") == GivenInput("x", [1])
    (tmp_path / "file").write_bytes(b"GIF89a")
    with pytest.raises(click.BadParameter, match="no PNG, JPEG or WebP image, and no JSON"):
        read_value(tmp_path / "file")


# Arrays


@pytest.mark.parametrize(
    ("value", "declared", "shape", "note"),
    [
        ([1.0, 2.0], (-1,), (2,), None),
        ([1.0, 2.0], (-1, 2), (1, 2), "x: float64 [2] -> FP32 [1, 2]"),
        (2.5, (), (), None),
        ([1.0, 2.0], (), (2,), None),
        (
            file_of(np.ones((2, 2), np.float32)),
            (1, 2, 2),
            (1, 2, 2),
            "x.npy: float32 [2, 2] -> FP32 [1, 2, 2]",
        ),
        (file_of(np.ones(2, np.uint8)), (-1,), (2,), "x.npy: uint8 [2] -> FP32 [2]"),
        (file_of(0, x=np.ones(2, np.float32)), (-1,), (2,), None),
        (file_of(0, x=np.ones(2)), (-1,), (2,), "x: float64 [2] -> FP32 [2]"),
    ],
)
def test_array_fits_declared_shape_and_datatype(
    value: Any, declared: tuple[int, ...], shape: tuple[int, ...], note: str | None
) -> None:
    array, notes = built(value, "FP32", *declared)
    assert (array.dtype, array.shape, notes) == (np.float32, shape, [note] if note else [])


@pytest.mark.parametrize("declared", [(4, 2), (3,), (-1, 3), (2, -1, -1)])
def test_array_of_another_shape_is_refused(declared: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x.npy has the shape \[2\]; input 'x' takes \["):
        built(file_of(np.ones(2)), "FP32", *declared)


def test_archive_and_object_name_inputs() -> None:
    metadata = fill(ModelMetadata, inputs=[tensor(name, "INT64", -1) for name in "ab"])
    for value in (file_of(0, a=np.array([1]), b=np.array([2])), {"a": [1], "b": [2]}):
        found = build_inputs([GivenInput(None, value)], metadata, AS_DECLARED, print)
        assert {name: array.tolist() for name, array in found.items()} == {"a": [1], "b": [2]}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (file_of(np.array([1.5])), "1.5 does not fit INT64"),
        (file_of(np.array([None])), "Object arrays cannot be loaded"),
        (InputFile("x.npy", b"\x93NUMPY\x01\x00nonsense"), "read safely"),
        (InputFile("x.npz", b"PK\x03\x04nonsense"), "read safely"),
        (InputFile("x.npy", file_of(np.zeros(9)).content.replace(b"(9,)", b"(9000000000000,)")), "safely"),
    ],
)
def test_unsafe_or_lossy_file_is_refused(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(value, "INT64", -1)


def test_archive_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadledger.cli.arrays.MAX_FILE_BYTES", 2**20)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**20 + 1))
    with pytest.raises(ValueError, match="unpacks to more than 1 MiB"):
        built(InputFile("x.npz", content.getvalue()), "FP32", -1)


def test_omitted_name_needs_a_single_known_input() -> None:
    several = fill(ModelMetadata, inputs=[tensor("a", "FP32"), tensor("b", "FP32")])
    for metadata, words in ((several, "the inputs a, b"), (None, "not loaded")):
        with pytest.raises(ValueError, match=words):
            build_inputs([GivenInput(None, [1])], metadata, AS_DECLARED, print)
    with pytest.raises(ValueError, match="only a loaded model"):
        build_inputs([GivenInput("x", picture())], None, AS_DECLARED, print)


# Pictures


@pytest.mark.parametrize(
    ("declared", "options", "shape", "red", "said"),
    [
        (("FP32", 1, 3, 5, 6), {}, (1, 3, 5, 6), 1.0, "float32 [1, 3, 5, 6] (NCHW), values 0..1"),
        (("FP32", -1, -1, -1, -1), {}, (1, 3, 2, 4), 1.0, "float32 [1, 3, 2, 4] (NCHW), values 0..1"),
        (("FP16", 1, 5, 6, 3), {}, (1, 5, 6, 3), 1.0, "float16 [1, 5, 6, 3] (NHWC), values 0..1"),
        (("UINT8", -1, -1, 3), {}, (2, 4, 3), 255, "uint8 [2, 4, 3] (HWC), values 0..255"),
        (("FP32", 1, 4, -1, -1), {}, (1, 4, 2, 4), 1.0, "float32 [1, 4, 2, 4] (NCHW), values 0..1"),
        (("FP32", 3, -1, -1), {"size": (8, 7)}, (3, 7, 8), 1.0, "float32 [3, 7, 8] (CHW), values 0..1"),
        (("FP32", 1, -1, -1, -1), {"layout": "NHWC"}, (1, 2, 4, 3), 1.0, "(NHWC), values 0..1"),
        (("FP32", 1, 3, -1, -1), {"scale": 1.0}, (1, 3, 2, 4), 255.0, "values 0..255"),
        (("FP32", 1, 3, -1, -1), {"mean": (0.5,), "std": (0.5,)}, (1, 3, 2, 4), 1.0, "values -1..1"),
        (("FP32", 1, 3, -1, -1), {"mean": (1.0, 0.0, 0.0)}, (1, 3, 2, 4), 0.0, "values -1..1"),
        (("INT32", 1, 3, -1, -1), {}, (1, 3, 2, 4), 255, "int32 [1, 3, 2, 4] (NCHW), values 0..255"),
    ],
)
def test_picture_follows_declared_input_and_options(
    declared: tuple[Any, ...], options: Any, shape: tuple[int, ...], red: float, said: str
) -> None:
    array, [note] = built(picture(), *declared, **options)
    assert array.shape == shape
    assert array.reshape(-1)[0] == red
    assert note.startswith("image.png: 4x2 RGB -> ")
    assert note.endswith(said)


@pytest.mark.parametrize(("declared", "shape"), [((1, 1, -1, -1), (1, 1, 2, 4)), ((2, 4), (2, 4))])
def test_picture_is_grey_for_one_channel(declared: tuple[int, ...], shape: tuple[int, ...]) -> None:
    array, _ = built(picture(colour=(255, 255, 255)), "UINT8", *declared)
    assert (array.shape, set(array.reshape(-1).tolist())) == (shape, {255})


def test_picture_is_sent_as_it_is_for_bytes() -> None:
    given = picture(kind="JPEG")
    texts, [note] = built(given, "BYTES", -1)
    assert (texts.tolist(), note) == (
        [given.content],
        f"image.jpeg: its {len(given.content)} bytes as they are -> BYTES [1]",
    )
    numbers, _ = built(given, "UINT8", -1)
    assert numbers.tobytes() == given.content


@pytest.mark.parametrize(
    ("value", "declared", "options", "words"),
    [
        (picture(), (1, 224, 224, 7), {}, "say --layout"),
        (picture(), (1, 7, 2, 4), {"layout": "NCHW"}, "7 channels"),
        *(
            (picture(), shape, {}, r"takes FP32 of the shape \[.*, which is none of pictures: give numbers")
            for shape in ((5,), (-1, 5), (1, 5), (-1, -1), (2, 3, 4, 5, 6))
        ),
        (picture(), (1, 3, -1, -1), {"mean": (1.0, 2.0)}, "one for each of 3 channels"),
        (picture(), (1, 3, 10**6, 10**6), {}, "pixels"),
        (picture(mode="I;16", colour=9), (1, 1, -1, -1), {}, r"beyond 0\.\.255"),
        (InputFile("a.png", picture().content[:50]), (1, 3, -1, -1), {}, "cannot be read"),
        (InputFile("a.png", b"\x89PNG\r\n\x1a\nnonsense"), (1, 3, -1, -1), {}, "cannot be read"),
    ],
)
def test_unfit_picture_is_refused_with_advice(
    value: Any, declared: tuple[int, ...], options: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        built(value, "FP32", *declared, **options)


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for size in ((11, 10), (100, 100)):
        with pytest.raises(ValueError, match="more than"):
            built(picture(size), "FP32", 1, 3, -1, -1)


def test_picture_without_pillow_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ValueError, match=r"pip install 'loadledger\[images\]'"):
        built(InputFile("a.png", b"\x89PNG\r\n\x1a\n"), "FP32", 1, 3, -1, -1)


# Results


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.array([1.5, float("nan")], np.float32), "[1.5, NaN]"),
        (np.array([0.1], np.float32), "[0.1]"),
        (np.array([True, False]), "[true, false]"),
        (np.array(["ü", "b"], object), '["ü", "b"]'),
        (np.array(7), "[7]"),
        (np.zeros((0, 3)), "[]"),
        (np.arange(20).reshape(4, 5), "min 0, max 19, mean 9.5"),
        (
            np.arange(20.0)[None] / 4,
            "min 0, max 4.75, mean 2.375; top 5: 19 (4.75), 18 (4.5), 17 (4.25), 16 (4), 15 (3.75)",
        ),
        (np.array([float("nan"), *[1.0] * 19]), "min 1, max 1, mean 1; 1 NaN"),
        (np.full(20, float("nan")), "20 NaN"),
        (np.array([True] * 20), "20 of 20 true"),
    ],
)
def test_output_is_shown_whole_or_summarised(array: Any, shown: str) -> None:
    assert describe_data(array) == shown


def test_result_json_names_what_json_lacks() -> None:
    arrays = {"y": np.array([[1.5, float("-inf")]], np.float32), "z": np.array(["a"], object)}
    result = InferenceResult(arrays, {"y": "FP32", "z": "BYTES"}, InferenceHead([], "m", "1"))
    assert json.loads(json.dumps(result_json(result))) == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.5, "-Infinity"]},
            {"name": "z", "datatype": "BYTES", "shape": [1], "data": ["a"]},
        ],
    }


def test_outputs_are_written_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {"y": np.arange(3), "z": np.array(["ü"], object)}
    write_arrays(tmp_path / "a.npz", arrays)
    with np.load(tmp_path / "a.npz") as found:
        assert {name: found[name].tolist() for name in found.files} == {"y": [0, 1, 2], "z": ["ü"]}
    write_arrays(tmp_path / "y.npy", {"y": arrays["y"]})
    assert np.load(tmp_path / "y.npy").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="the outputs y, z"):
        write_arrays(tmp_path / "y.npy", arrays)
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "y.npy"}
