"""Memory, requests and latencies over a time."""

from __future__ import annotations

from typing import Annotated

from answers.answer import AnswerBody, about

_QUANTILE = "of the answered requests, in seconds, estimated from a histogram; null without any."


class Latencies(AnswerBody, frozen=True, kw_only=True):
    """Requests of an interval and their latencies."""

    requests: Annotated[int, about("Answered requests.")]
    failures: Annotated[int, about("Requests that failed in the worker.")]
    p50_s: Annotated[float | None, about(f"Median {_QUANTILE}")]
    p95_s: Annotated[float | None, about(f"95 % quantile {_QUANTILE}")]
    p99_s: Annotated[float | None, about(f"99 % quantile {_QUANTILE}")]


class Interval(Latencies, frozen=True, kw_only=True):
    """An interval; the last one of the long range has not ended."""

    at: Annotated[str, about("The end of the interval.")]


class ModelInterval(Interval, frozen=True, kw_only=True):
    """An interval of a model."""

    memory_bytes: Annotated[int | None, about("The most that its workers took; null without one.")]


class ServerInterval(Interval, frozen=True, kw_only=True):
    """An interval of the server."""

    server_bytes: Annotated[int, about("Memory of the server's own process, without pages of files.")]
    used_bytes: Annotated[int, about("Memory of the workers of loaded models.")]
    reserved_bytes: Annotated[int, about("Reserved for loads.")]
    budget_bytes: int


class _Samples(AnswerBody, frozen=True, kw_only=True):
    range: str
    interval_s: int
    whole: Annotated[Latencies, about("Of all points together.")]


class ServerSamples(_Samples, frozen=True, kw_only=True):
    """Samples of the server since its start, at most of a range. They end with the server."""

    points: Annotated[list[ServerInterval], about("Oldest first.")]


class ModelSamples(_Samples, frozen=True, kw_only=True):
    """Samples of a model since the server's start; without any, it had no worker in that time."""

    points: Annotated[list[ModelInterval], about("Oldest first.")]
