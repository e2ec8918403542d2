"""The reference page of the errors, from the table of codes: what each says, and what to do."""

from collections.abc import Mapping
from itertools import groupby

from server.errors import ERRORS
from tools.markdown import table

ADVICE: Mapping[str, str] = {
    "invalid_request": "Correct the request: `detail` says what is wrong with it.",
    "invalid_body": "Correct the body: `detail` names the member.",
    "invalid_parameter": "Correct the parameter that `detail` names.",
    "not_supported": "Leave out what `detail` names; it is refused so that nobody believes that it was done.",
    "beyond_head": "The position is not there yet. If it was, this is another ledger: ask who restored what.",
    "invalid_defaults": "Correct the model's `loadledger.toml`; `detail` says where.",
    "inference_failed": "The message is ONNX Runtime's. Look at the inputs; the same will fail again.",
    "inference_cancelled": "The client went away, or somebody unloaded by force. Ask again, if it is still"
    " wanted.",
    "invalid_input": "Send what the model takes: `GET /v2/models/{id}` says names, types and shapes.",
    "invalid_model": "ONNX Runtime does not take the file; the message is its own. Export the model again.",
    "warm_up_failed": "Give inputs that the model runs on, as [[warm_up.inputs]], or switch its warm-up off.",
    "model_changed": "Somebody wrote to the files while they were read. Load again when the copying is done.",
    "unsafe_file": "Replace links out of the repository, external data outside the folder, pipes and"
    " devices.",
    "crash_loop": "The server died with this load three times, or the model's workers too often. Look at the"
    " `WorkerExited` events, then load again.",
    "job_failed": "The job has the reason: `error.message`.",
    "cancelled": "Somebody cancelled the job; `CancelRequested` in the ledger says who.",
    "not_ready": "Load the model, or wait for its load.",
    "not_representable": "Ask for this output as bytes: `binary_data`.",
    "no_credentials": "Send `Authorization: Bearer TOKEN`.",
    "invalid_token": "Get a new token: `detail` says what is wrong with this one.",
    "forbidden": "Use a token with one of the roles that `detail` names. The attempt is in the ledger.",
    "not_found": "Correct the path; `/openapi.yaml` has all of them.",
    "unknown_model": "Look at the name, and at the folder of that name in the repository.",
    "unknown_version": "Look at the version, and whether its `model.onnx` is there.",
    "unknown_job": "Look at the id. Jobs that were archived are in the archive: `loadledger replay"
    " --archive`.",
    "method_not_allowed": "Use a method that `Allow` names.",
    "body_timeout": "Send the body without a pause; look at the network.",
    "head_timeout": "Send the head of a request without a pause; `--head-timeout-s` is how long it may take.",
    "nothing_loaded": "There is nothing to unload.",
    "already_finished": "The job has ended; look at its status.",
    "already_started": "It is too late to cancel. To end a load all the same, unload with `?force=true`.",
    "not_loaded": "There is nothing to unload. A load that still runs is ended by `?force=true`.",
    "archived": "Ask from `oldest` on, or ask the archives: `loadledger replay --archive`.",
    "body_too_large": "Send less at once, or in bytes rather than JSON.",
    "target_too_long": "Ask with a shorter path and query; fewer filters at once, say.",
    "unsupported_media_type": "Send `Content-Type: application/json` in UTF-8, or a coding that `detail`"
    " names.",
    "idempotency_mismatch": "Use a new key for a new request.",
    "rate_limited": "Come back after `Retry-After`; the limits are `--limit-…`.",
    "too_many_failures": "Correct the token and wait for `Retry-After`. Behind a proxy, all clients have one"
    " address.",
    "queue_full": "Wait until some jobs have ended.",
    "too_many_streams": "Close streams that nobody reads, or raise `--streams-per-subject`.",
    "head_too_large": "Send fewer or shorter header fields.",
    "internal": "A bug. The server's log has the reason under the reference in `instance`.",
    "inference_queue_full": "Ask less at once, give the model more `instances`, or raise"
    " `--inference-queue`.",
    "bodies_full": "Too many large bodies are being read at once: come back after `Retry-After`.",
    "too_many_connections": "Close connections that nobody uses, or raise `--max-connections`.",
    "model_not_loaded": "Load it, or have the server do that: `--on-demand on`.",
    "load_failed": "`detail` says why it could not be loaded; it is tried again after `Retry-After`.",
    "model_unloading": "Come back after `Retry-After`: another version may take its place.",
    "worker_died": "Ask again: the worker is replaced. Of a load, `WorkerExited` has its last words.",
    "out_of_memory": "Raise the load's `memory_limit_bytes`; with none, the machine had no more.",
    "insufficient_memory": "Unload a model, have the server do that (`--evict idle`), or raise"
    " `--memory-budget`.",
    "too_many_loaded": "Unload a model, have the server do that (`--evict idle`), or raise `--max-loaded`.",
    "timeout": "`detail` says what it waited for. Give it more `timeout_s`, or what it waited for.",
    "fork_server_died": "It is started again by itself, and what was loaded comes back; load again.",
    "fork_server_unavailable": "It is started again by itself: come back after `Retry-After`.",
    "log_unavailable": "Look at the disk of the data directory: full, or read-only.",
    "unhealthy": "`detail` names what is not well. What cannot come back by itself ends the process: see its"
    " log.",
    "shutting_down": "Come back when the server is up again; what was accepted goes on then.",
    "inference_timeout": "Allow more time (`timeout`, `--inference-timeout-s`), or ask for less at once.",
}
"""What whoever meets a code can do."""

_HEAD = """\
# Errors

Generated from the one table of codes; a test holds this page to it. Every error is one JSON body (RFC 9457),
here of a model that is not there:

```json
{"type": "urn:loadledger:error:unknown_model", "title": "No such model", "status": 404,
 "detail": "model 'nothing' is not in the repository", "code": "unknown_model",
 "error": "model 'nothing' is not in the repository"}
```

Programs decide by `code`, which is stable; `detail` is for people, and `error` repeats it for clients of the
Open Inference Protocol. A load that fails is no error of its request: its job says `failed`, with one of
these codes and a message, often ONNX Runtime's own. `POST /v2/repository/models/{id}/load` waits for the job,
and so answers with that code itself.
"""


def error_page() -> str:
    """Return the page."""
    parts = [_HEAD]
    for status, codes in groupby(sorted(ERRORS, key=_status), key=_status):
        rows = ((f"`{code}`", ERRORS[code].title, ADVICE[code]) for code in codes)
        parts.append(f"## {status}\n\n{table(('code', 'what', 'what to do'), rows)}")
    return "\n".join(parts)


def _status(code: str) -> int:
    return ERRORS[code].status
