"""Trains a text classifier: an order in plain words goes in, what it is about comes out.

Run it with the `examples` extra installed: `python examples/intents.py`. It writes `intents.onnx` to the
current folder. The words are made up here, so nothing is downloaded.
"""

import itertools
from pathlib import Path
from typing import Any

import click
import onnx
from skl2onnx import to_onnx
from skl2onnx.common.data_types import StringTensorType
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

FILE = Path("intents.onnx")
PHRASES = {
    "alarm": (("wake me", "set an alarm", "remind me"), ("at six", "at noon", "tomorrow", "in ten minutes")),
    "lights": (("turn on", "switch off", "dim"), ("the lights", "the lamp", "the light in the kitchen")),
    "music": (("play", "put on", "listen to"), ("some jazz", "a song", "my favourite album", "the radio")),
    "weather": (
        ("will it rain", "is it cold", "do i need an umbrella"),
        ("today", "tomorrow", "in the evening"),
    ),
}
"""Each label's sentences: one of the first and one of the second."""
OPSET = {"": 17, "ai.onnx.ml": 3}
"""Known to every ONNX Runtime that the server accepts."""


def train() -> Any:
    """Return a pipeline from sentences to labels: weights of words, then a logistic regression."""
    sentences, labels = [], []
    for label, parts in PHRASES.items():
        for words in itertools.product(*parts):
            sentences.append(" ".join(words))
            labels.append(label)
    # Letters only: the converter knows simple patterns of words, and not scikit-learn's default.
    pipeline = make_pipeline(TfidfVectorizer(token_pattern="[a-z]+"), LogisticRegression(C=10))  # noqa: S106
    return pipeline.fit(sentences, labels)


def export(pipeline: Any) -> onnx.ModelProto:
    """Convert the pipeline.

    Returns:
        A model from `text` [N] BYTES to `label` [N] BYTES and `probabilities` [N, 4] FP32.
    """
    model: onnx.ModelProto = to_onnx(
        pipeline,
        initial_types=[("text", StringTensorType([None]))],
        options={"zipmap": False},
        target_opset=OPSET,
    )
    for node in model.graph.node:
        if node.op_type == "StringNormalizer":
            # The default is en_US.UTF-8, which a container often lacks: such a model would not load there.
            node.attribute.append(onnx.helper.make_attribute("locale", "C"))
    model.opset_import.sort(key=lambda opset: opset.domain)  # comes out of a set, in any order
    return model


def main() -> None:
    """Train, export, write, and print the size and the labels."""
    pipeline = train()
    model = export(pipeline).SerializeToString(deterministic=True)
    FILE.write_bytes(model)
    click.echo(f"{FILE}: {len(model):,} bytes, {', '.join(pipeline.classes_)}")


if __name__ == "__main__":
    main()
