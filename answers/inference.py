"""The Open Inference Protocol, with the extensions of Triton: metadata, inference, statistics, index."""

from __future__ import annotations

from typing import Annotated, Any

from answers.answer import AnswerBody, about
from answers.tensors import ModelTensor, NamedTensor


class ModelMetadata(AnswerBody, frozen=True, kw_only=True, omit_defaults=False):
    """Inputs and outputs of a model; -1 in a shape is any length."""

    # The client reads it from other servers of the protocol, too, which may leave members out.

    name: str = ""
    versions: Annotated[list[str], about("Those that are loaded.")] = []
    platform: str = ""
    inputs: list[ModelTensor] = []
    outputs: list[ModelTensor] = []


class ModelReady(AnswerBody, frozen=True, kw_only=True):
    """The readiness of a model."""

    name: str
    ready: bool


class BinarySize(AnswerBody, frozen=True, kw_only=True):
    """The parameters of a binary tensor."""

    binary_data_size: Annotated[int, about("In bytes.")]


class InferenceOutput(NamedTensor, frozen=True, kw_only=True):
    """An output of the model."""

    data: Annotated[list[Any], about("Flat, row-major; of a JSON output.")] = []
    parameters: Annotated[BinarySize | None, about("Of a binary output.")] = None


class InferenceAnswer(AnswerBody, frozen=True, kw_only=True):
    """The model's answer."""

    model_name: str
    model_version: str
    id: Annotated[str | None, about("The request's id, if it has one.")] = None
    outputs: list[InferenceOutput]


class ServerMetadata(AnswerBody, frozen=True, kw_only=True):
    """Name, version and extensions of the server."""

    name: str
    version: str
    extensions: list[str]


class DurationTotal(AnswerBody, frozen=True, kw_only=True):
    """A count, and the total time."""

    count: int
    ns: int


class BatchStatistics(AnswerBody, frozen=True, kw_only=True):
    """The executions of one size."""

    batch_size: int
    compute_input: DurationTotal
    compute_infer: DurationTotal
    compute_output: DurationTotal


class MemoryUsage(AnswerBody, frozen=True, kw_only=True):
    """The memory of a load, as measured after it."""

    type: str
    id: int
    byte_size: int


class ModelStatistics(AnswerBody, frozen=True, kw_only=True):
    """The inferences of a loaded version since it was loaded."""

    name: str
    version: str
    last_inference: Annotated[int, about("Milliseconds since 1970.")]
    inference_count: Annotated[int, about("Batch sizes added up.")]
    execution_count: int
    inference_stats: Annotated[
        dict[str, DurationTotal],
        about(
            "Of success, fail, queue, compute_input, compute_infer, compute_output, transport, "
            "cache_hit and cache_miss. The times of queue, compute and transport add up to that "
            "of success."
        ),
    ]
    response_stats: dict[str, Any]
    batch_stats: list[BatchStatistics]
    memory_usage: list[MemoryUsage]


class StatisticsList(AnswerBody, frozen=True, kw_only=True):
    """The statistics of loaded models."""

    model_stats: list[ModelStatistics]


class IndexEntry(AnswerBody, frozen=True, kw_only=True):
    """One version of a model; only the name of a model that was never loaded."""

    name: str
    version: str | None = None
    state: Annotated[str | None, about("READY, LOADING, UNLOADING or UNAVAILABLE.")] = None
    reason: Annotated[str | None, about("Why the version is UNAVAILABLE.")] = None


class ConfiguredTensorInfo(AnswerBody, frozen=True, kw_only=True):
    """An input or output; `dims` are without the batch dimension where `max_batch_size` is not 0."""

    name: str
    data_type: str
    dims: list[int]
    reshape: Annotated[dict[str, Any], about("The model's own shape, if it is a scalar.")] = {}
    optional: Annotated[bool | None, about("Of an input: whether it may be left out.")] = None


class ModelConfig(AnswerBody, frozen=True, kw_only=True):
    """The configuration."""

    name: str
    platform: str
    backend: str
    version_policy: Annotated[dict[str, Any], about("The one version that is loaded.")]
    max_batch_size: int
    input: list[ConfiguredTensorInfo]
    output: list[ConfiguredTensorInfo]
    instance_group: list[dict[str, Any]]
    dynamic_batching: Annotated[
        dict[str, Any], about("Present if requests run in batches, have priorities, or a limit of their own.")
    ] = {}
    default_model_filename: str
    model_transaction_policy: dict[str, Any]
