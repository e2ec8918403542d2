"""Inputs and outputs of models."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about, one_of


class NamedTensor(AnswerBody, frozen=True, kw_only=True):
    """A tensor, or the specification of one."""

    name: str
    datatype: str
    shape: list[int]


class TensorExample(AnswerBody, frozen=True, kw_only=True):
    """A value of an input that the model ran on when it was loaded."""

    shape: list[int]
    values: Annotated[str, one_of("zeros", "ones")]
    refusal: Annotated[
        str | None, about("Of a guess: what the model said to it, or why it was not tried.")
    ] = None


class ModelTensor(NamedTensor, frozen=True, kw_only=True):
    """An input or output of a model; -1 in its shape is any length."""

    optional: Annotated[bool, about("Whether an input may be left out; missing if not.")] = False
    dimensions: Annotated[
        list[str], about("What the model calls each dimension; empty for one without a name.")
    ] = []
    example: Annotated[
        TensorExample | None, about("Of an input of a loaded model: what its warm-up ran on, or a guess.")
    ] = None

    def describe_shape(self) -> str:
        """Return the shape with the names of open dimensions: `[batch, 3, -1, 64]`."""
        names = self.dimensions or [""] * len(self.shape)
        words = [
            str(length) if length >= 0 else name or "-1"
            for length, name in zip(self.shape, names, strict=False)
        ]
        return f"[{', '.join(words)}]"
