"""Files of records in the hands of pandas, DuckDB and numpy: nothing of ours reads them."""

import base64
import math
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from support.candidates import TENSORS, make_candidate, make_tensor

from features.records.files import RecordFiles
from features.records.recorder import Entry
from runtime.wire import Tensor

ARRAY = np.linspace(-1, 1, 12).reshape(3, 4).astype("<f4")
LABELS = Tensor("label", "INT64", (3,), b"[7, 1, 4]", text=True)
MODELS = ("digits", "fraud-eu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of closed files: of each model an answered, a failed and an aborted inference, two lost."""
    files = RecordFiles(tmp_path / "records", (TENSORS,), "node-a")
    for number, model in enumerate(MODELS):
        question = make_tensor(ARRAY + number)
        ended = (
            make_candidate(question, outputs=(LABELS,), request_id="r1", model_id=model, rule=TENSORS),
            make_candidate(
                question, outputs=None, request_id="r2", model_id=model, status=504, code="timeout"
            ),
            make_candidate(outputs=None, request_id="r3", model_id=model, code="aborted"),
        )
        queue = [Entry(model, each, 1, 0) for each in ended]
        files.write(queue, {(model, "queue_full"): 2}, 0.0)
    for each in files.close_old(math.inf):
        files.give_name(each.path)
    return files.folder


def test_pandas_reads_a_file_and_numpy_its_tensors(folder: Path) -> None:
    [path] = (folder / "digits").glob("*.jsonl")
    frame = pd.read_json(path, lines=True)
    assert list(frame["type"]) == ["loadledger.dropped", *["loadledger.inference"] * 3]
    assert frame["dropped"].sum() == 2
    records = frame[frame["type"] == "loadledger.inference"].set_index("id")
    assert list(records["status"].fillna(0)) == [200, 504, 0]
    assert list(records["code"].fillna("")) == ["", "timeout", "aborted"]
    assert pd.api.types.is_datetime64_any_dtype(pd.to_datetime(records["time"]))
    [tensor] = records.loc["r1", "inputs"]
    data = base64.b64decode(tensor["data"])
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(tensor["shape"]), ARRAY)
    assert "data" not in records.loc["r2", "inputs"][0]
    flat = pd.json_normalize(records.loc[["r1"]].to_dict("records"), "outputs", ["model"])
    assert list(zip(flat["model"], flat["name"], flat["form"], strict=True)) == [("digits", "label", "json")]


def test_duckdb_queries_all_files_and_decodes_tensors(folder: Path) -> None:
    with duckdb.connect() as connection:
        connection.execute(
            f"CREATE VIEW lines AS FROM read_ndjson('{folder}/*/*.jsonl', union_by_name = true)"
        )
        counts = """
            SELECT model, count(*) FILTER (type = 'loadledger.inference'), sum(dropped),
                count(*) FILTER (code IS NOT NULL)
            FROM lines GROUP BY model ORDER BY model
        """
        assert connection.execute(counts).fetchall() == [(model, 3, 2, 2) for model in MODELS]
        of_time = "SELECT count(*) FROM lines WHERE time >= TIMESTAMPTZ '2026-01-01T00:00:00.000001Z'"
        assert connection.execute(of_time).fetchall() == [(8,)]
        tensors = """
            SELECT model, shape, from_base64(data), sha256 = sha256(from_base64(data))
            FROM (SELECT model, unnest(inputs, recursive := true) FROM lines)
            WHERE data IS NOT NULL ORDER BY model
        """
        found = connection.execute(tensors).fetchall()
        outputs = "SELECT from_base64(outputs[1].data)::VARCHAR FROM lines WHERE id = 'r1'"
        assert connection.execute(outputs).fetchall() == [("[7, 1, 4]",)] * 2
    for number, (model, shape, data, is_same) in enumerate(found):
        assert (model, is_same) == (MODELS[number], True)
        np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(shape), ARRAY + number)
