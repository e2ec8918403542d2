"""Trains the two digits classifiers of this folder and writes them with the digits they have never seen.

Run it with the `examples` extra installed: `python examples/train.py`. Equal package versions give equal
bytes on processors of one kind.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType, Int64TensorType
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

HERE = Path(__file__).parent
SEED = 0
# A third of 1,797 digits: one digit moves the accuracy by 0.2 %, so the better version still shows.
HELD_OUT = 1 / 3
# The newest operators the converter may use (it writes the oldest that do): fixed, so that a newer converter
# writes the same, and known to every ONNX Runtime that the server accepts.
OPSET = {"": 17, "ai.onnx.ml": 3}
PIXELS = 64
CLASSES = 10


def classifiers() -> dict[int, Any]:
    """Return the untrained classifier of each version; the second is the better one."""
    return {
        1: LogisticRegression(C=0.01, max_iter=1000),
        # An SVC has no probabilities of its own; `ensemble=False` keeps a single SVC in the file.
        2: CalibratedClassifierCV(SVC(C=10), ensemble=False),
    }


def to_onnx(classifier: Any) -> onnx.ModelProto:
    """Convert a trained classifier.

    Returns:
        A model from `pixels` [N, 64] FP32 to `label` [N] INT64 and `probabilities` [N, 10] FP32.
    """
    with warnings.catch_warnings():
        # skl2onnx asks for an attribute that scikit-learn is about to drop, and can do without it.
        warnings.filterwarnings("ignore", "Attribute `prob[AB]_` was deprecated", FutureWarning)
        model: onnx.ModelProto = convert_sklearn(
            classifier,
            name="digits",  # the default is a random name
            initial_types=[("pixels", FloatTensorType([None, PIXELS]))],
            final_types=[
                ("label", Int64TensorType([None])),
                ("probabilities", FloatTensorType([None, CLASSES])),
            ],
            options={"zipmap": False},
            target_opset=OPSET,
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    model.opset_import.sort(key=lambda opset: opset.domain)  # comes out of a set, in any order
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: bytes, pixels: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of `pixels` (FP32 [N, 64]) that ONNX Runtime gives their `labels` (INT64 [N])."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    given = session.run(["label"], {"pixels": pixels})[0]
    return float(np.mean(given == labels))


def held_out_json(pixels: np.ndarray, labels: np.ndarray) -> str:
    """Return the digits as JSON, one a line: `inputs[i]` are 64 integers 0 to 16 that show `labels[i]`."""
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in pixels.astype(int).tolist())
    return f'{{"inputs":[\n{rows}\n],\n"labels":{json.dumps(labels.tolist(), separators=(",", ":"))}}}\n'


def main() -> None:
    """Train, convert, write and print the accuracy and size of each version."""
    digits = load_digits()
    pixels, held_out, labels, held_out_labels = train_test_split(
        digits.data.astype(np.float32),
        digits.target.astype(np.int64),
        test_size=HELD_OUT,
        random_state=SEED,
        stratify=digits.target,
    )
    (HERE / "digits.json").write_text(held_out_json(held_out, held_out_labels), encoding="ascii")
    first = json.dumps(held_out[:1].astype(int).tolist())
    (HERE / "digit.json").write_text(f"{first}\n", encoding="ascii")
    for version, classifier in classifiers().items():
        model = to_onnx(classifier.fit(pixels, labels)).SerializeToString(deterministic=True)
        path = HERE / "digits" / str(version) / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model)
        share = accuracy(model, held_out, held_out_labels)
        click.echo(f"digits/{version}: {share:.2%} of {len(held_out)} held-out digits, {len(model):,} bytes")


if __name__ == "__main__":
    # Sums in another order round differently: one thread, the same bytes on every machine of a kind.
    with threadpool_limits(1):
        main()
