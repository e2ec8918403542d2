"""Inputs that are made up for a model are what its inputs are declared to be, and the same each time."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import models
from support.events import PLAIN
from support.workers import array, ask, order_of, running_pool

from runtime.prepared.samples import MAX_SAMPLE_BYTES, samples
from runtime.wire import DATATYPES, TensorSpec

SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(max_size=5),
        st.sampled_from(sorted(DATATYPES)),
        st.lists(st.integers(-1, 3), max_size=3).map(tuple),
        st.booleans(),
    ),
    max_size=3,
    unique_by=lambda spec: spec.name,
)


@PLAIN
@given(SPECS)
def test_they_have_the_names_datatypes_and_shapes_that_are_declared(specs: list[TensorSpec]) -> None:
    required = [spec for spec in specs if not spec.optional]
    made = list(samples(specs))
    assert made
    for tensors in made:
        assert [(each.name, each.datatype) for each in tensors] == [(s.name, s.datatype) for s in required]
        for spec, tensor in zip(required, tensors, strict=True):
            assert len(tensor.shape) == len(spec.shape)
            for declared, length in zip(spec.shape, tensor.shape, strict=True):
                assert length == declared or (declared == -1 and length in {1, 2, 8, 64})
            if spec.datatype != "BYTES":
                array(tensor)  # which checks the size of the data


async def test_a_model_of_texts_takes_them(tmp_path: Path) -> None:
    models.save(models.strings(), tmp_path, "m")
    async with running_pool() as pool:
        worker = await pool.start("w")
        report = await worker.load(order_of(tmp_path, "m"), lambda _: None)
        for tensors in samples(report.inputs):
            assert await ask(worker, tensors)


@PLAIN
@given(SPECS)
def test_they_are_the_same_each_time(specs: list[TensorSpec]) -> None:
    assert list(samples(specs)) == list(samples(specs))


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"BYTES"}))
def test_they_are_between_minus_one_and_one_and_not_all_the_same(datatype: str) -> None:
    noise, zeros = list(samples([TensorSpec("x", datatype, (100,))]))
    if datatype != "BF16":  # which numpy has no name for
        found = array(noise[0]).astype(float)
        assert abs(found).max() <= 1
    assert len({bytes(noise[0].data)[i : i + 2] for i in range(0, len(noise[0].data), 2)}) > 1
    assert not any(zeros[0].data)


def test_what_is_open_is_tried_in_several_lengths_and_only_one_row_is_long() -> None:
    shapes = [tensors[0].shape for tensors in samples([TensorSpec("x", "FP32", (-1, 3, -1))])]
    assert shapes[::2] == shapes[1::2] == [(1, 3, 8), (8, 3, 8), (2, 3, 8), (1, 3, 64)]


def test_what_is_declared_is_tried_once_as_noise_and_once_as_zeros() -> None:
    assert len(list(samples([TensorSpec("x", "FP32", (2, 3))]))) == 2


def test_where_many_rows_would_be_too_large_two_are_made() -> None:
    shapes = [tensors[0].shape for tensors in samples([TensorSpec("image", "FP32", (-1, 3, 640, 640))])]
    assert [shape[0] for shape in shapes] == [1, 1, 2, 2]


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"BYTES"}))
def test_rows_of_a_long_input_differ(datatype: str) -> None:
    [noise], _ = samples([TensorSpec("x", datatype, (64, 1024))])
    row = len(noise.data) // 64
    assert len({bytes(noise.data[start : start + row]) for start in range(0, len(noise.data), row)}) == 64


def test_what_would_be_too_large_is_not_made() -> None:
    side = math.isqrt(MAX_SAMPLE_BYTES // 4) + 1
    assert list(samples([TensorSpec("x", "FP32", (side, side))])) == []
    assert list(samples([TensorSpec("x", "FP32", (2**60, 2**60))])) == []


def test_what_the_protocol_has_no_type_for_is_not_made() -> None:
    assert list(samples([TensorSpec("x", "seq(tensor(float))", ())])) == []
