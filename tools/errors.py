"""The reference page of the errors, from the table of codes: title and advice of each."""

from collections.abc import Mapping
from itertools import groupby

from server.errors import ERRORS
from tools.markdown import table

ADVICE: Mapping[str, str] = {
    "invalid_request": "Correct the request: `detail` says what is wrong with it.",
    "invalid_body": "Correct the body: `detail` names the member.",
    "invalid_parameter": "Correct the parameter that `detail` names.",
    "not_supported": "Remove what `detail` names from the request; the server does not support it.",
    "beyond_head": "The log has not reached this position. If it had, an older ledger was restored.",
    "before_first_event": "Name a later time, or the position 0: `detail` has the time of the first event.",
    "invalid_defaults": "Correct the model's `loadledger.toml`; the message says where.",
    "inference_failed": "The message is ONNX Runtime's, or says that the inputs or outputs do not fit into"
    " the worker's memory. Check the inputs: the same request fails again.",
    "inference_cancelled": "The client disconnected, or the model was unloaded by force. Send the"
    " request again if needed.",
    "invalid_input": "Send the inputs that the model takes: `GET /v2/models/{id}` has names, types and"
    " shapes.",
    "invalid_model": "The message says what is wrong with the file, and what to do. Add the mended file as a"
    " new version.",
    "rows_depend": "The message names the operator. Load it without batching, or with `dependent_rows`"
    " `allow` if such answers will do.",
    "warm_up_failed": "Set inputs that the model can run as `[[warm_up.inputs]]`, or turn its warm-up off.",
    "model_changed": "The files changed while they were copied. Load again when they are complete.",
    "unsafe_file": "Replace links out of the repository, external data outside the folder, pipes and"
    " devices; use fewer files or shorter names if the message says so.",
    "signature_invalid": "`detail` says what is wrong with the version's `*.sig`: replace it, or remove it.",
    "signature_missing": "Sign the version, and put the bundle beside it, as `VERSION.sig`, or into it.",
    "signature_untrusted": "Sign with a key or certificate of the policy; `detail` names the signer.",
    "signature_mismatch": "`detail` names the first file that differs. Sign the version as it is now, or"
    " restore what was signed.",
    "signature_unsupported": "Sign again in the form that `detail` names.",
    "policy_differs": "Load again: the rules under which the load was accepted are in force no more.",
    "not_approved": "`detail` says what is missing, and `loadledger approve MODEL/VERSION` gives it.",
    "same_person": "Ask another person with the role `approve`, who did not add these files.",
    "emergency_forbidden": "Have the version approved, or let the operator set `emergency = true` in the"
    " rule.",
    "digest_differs": "Look at the files again: `loadledger verify-model MODEL/VERSION` shows their digest.",
    "not_encodable": "The message names the value. Rename files whose names are no text, or report a bug.",
    "crash_loop": "The server died with this load three times, or the model's workers too often. See the"
    " `WorkerExited` events, then load again.",
    "job_failed": "See the job's `error.message` for the reason.",
    "cancelled": "The job was cancelled; `CancelRequested` in the ledger has the subject.",
    "not_ready": "Load the model, or wait for its load.",
    "not_representable": "Request this output as bytes: `binary_data`.",
    "not_onnx": "`detail` says what the file is. Download or export the model again.",
    "digest_mismatch": "Send the file again; the network, or something on the way, changed it.",
    "no_credentials": "Send `Authorization: Bearer TOKEN`.",
    "invalid_token": "Get a new token; `detail` says what is wrong with this one.",
    "forbidden": "Use a token with one of the roles that `detail` names. The attempt is in the ledger.",
    "not_found": "Correct the path; `/openapi.yaml` lists all routes.",
    "unknown_model": "Check the name, and the folder of that name in the repository.",
    "unknown_approval": "There is nothing to withdraw: `loadledger show MODEL` lists its approvals.",
    "unknown_label": "Check the label: the model shows its labels. A number is a version.",
    "unknown_version": "Check the version, and that its folder has a model file.",
    "unknown_job": "Check the id.",
    "unknown_upload": "Begin another upload: this one was committed or discarded, not used for a day, its"
    " node has ended, or it is another subject's.",
    "unknown_token": "`loadledger token list` lists the known ones. For a token of an identity provider, say"
    " how long it is valid at most (`expires_s`).",
    "unknown_node": "Check the name of the node.",
    "unknown_record_file": "`loadledger records list` lists the files of this server; each node has its own.",
    "method_not_allowed": "Use a method that `Allow` names.",
    "body_timeout": "Send the body without a pause; check the network.",
    "head_timeout": "Send the head without a pause, within 10 s.",
    "nothing_loaded": "There is nothing to unload.",
    "already_finished": "The job has ended; see its `status`.",
    "already_started": "It is too late to cancel. To end a load anyway, unload with `?force=true`.",
    "not_loaded": "There is nothing to unload. To end a load in progress, use `?force=true`.",
    "version_exists": "Choose another number: a version is never overwritten.",
    "version_in_use": "Unload the model, load another version, cancel the load, or move the label; then "
    "remove the version. `?force=true` ends the loads.",
    "record_file_open": "Erase it once it is closed: within an hour, or when the server stops.",
    "too_many_labels": "Remove a label that nobody uses, or move one that exists.",
    "no_nodes": "Only servers with `--ledger` are nodes.",
    "node_ended": "There is nothing to drain: its models are loaded at other nodes.",
    "repository_not_shared": "If all nodes mount one folder, start them with `--repository-writable=on`; if"
    " each has its own, with `--repository-writable=own`.",
    "repository_read_only": "`detail` says which setting or access right it is. Put the version's folder into"
    " the repository yourself.",
    "precondition_failed": "As `version_exists`: the request had `If-None-Match: *`.",
    "body_too_large": "Send less at once. Send tensors in binary instead of JSON. Of an inference,"
    " `--max-request-size` is the limit. A version may have 20 GB: put a larger one into the repository's"
    " folder.",
    "target_too_long": "Use a shorter path and query, for example fewer filters at once.",
    "unsupported_media_type": "Send `Content-Type: application/json` in UTF-8, or a coding that `detail`"
    " names.",
    "idempotency_mismatch": "Use a new key for a new request.",
    "rate_limited": "Retry after `Retry-After`; the limits are `--limit-…`.",
    "too_many_failures": "Correct the token and wait for `Retry-After`. A token that the server has accepted"
    " before passes; a new one waits, too. Behind a proxy, set `--trusted-proxies`: else all clients share"
    " its address.",
    "queue_full": "Wait until some jobs have ended.",
    "too_many_tokens": "Issue fewer tokens, for a shorter time.",
    "too_many_streams": "Close unused streams, or let programs use tokens of several subjects.",
    "head_too_large": "Send fewer or shorter header fields.",
    "internal": "This is a bug. The server's log has the reason under the reference in `instance`.",
    "unknown_transfer_coding": "Send `Transfer-Encoding: chunked` or `Content-Length`; compress the content"
    " with `Content-Encoding`.",
    "inference_queue_full": "Send fewer requests at once, or load the model with more `instances`"
    " or a larger `max_queue`.",
    "bodies_full": "Too many large bodies are in memory: retry after `Retry-After`.",
    "too_many_connections": "Close unused connections, or raise the limit of open files.",
    "too_many_files": "Raise the limit of open files: `LimitNOFILE=` of systemd, `ulimit -n`.",
    "model_not_loaded": "Load it, or let the server load it: `--on-demand on`.",
    "out_of_service": "Load it: `detail` says who unloaded it and when. No inference does that.",
    "bytes_gone": "A reload, and a load for an inference, take the bytes that were loaded before, and neither"
    " the store nor the repository has them. Put them back, or load the model again to use what the"
    " repository has now; unload it if it is to be gone.",
    "load_failed": "`detail` has the reason; the server tries again after `Retry-After`.",
    "node_unreachable": "Send the request again after `Retry-After`. If the node does not come back, its"
    " models are loaded at other nodes once its lease is over. Check that all nodes reach its"
    " `--node-address`.",
    "model_unloading": "Retry after `Retry-After`: another version may replace it.",
    "model_unloaded": "Load the model again, or ask who unloaded it: `detail` says who. After"
    " an unload until asked, the next inference loads it.",
    "model_replaced": "Retry: the new version answers. A longer `--drain-timeout-s` lets inferences end.",
    "model_evicted": "Retry where inferences load models (`--on-demand on`), else load it again; pin it to"
    " keep it loaded.",
    "model_moved": "Retry: another node loads the model.",
    "worker_died": "Retry: after an inference the worker is started again, unless it keeps dying."
    " `WorkerExited` in the ledger, or the log, has its last lines.",
    "out_of_memory": "The message has the figures. Raise the load's `memory_limit_bytes` or `--memory-budget`"
    ", or unload other models; without a limit, the machine has no more memory.",
    "insufficient_memory": "Unload a model, let the server evict idle models (`--evict idle`), or raise"
    " `--memory-budget`.",
    "too_many_loaded": "Unload a model, let the server evict idle models (`--evict idle`), or raise"
    " `--max-loaded`.",
    "disk_full": "Free as many bytes as the message names on the disk of the data directory.",
    "store_full": "Unload a model, or raise `--store-size`; the message has both figures.",
    "store_unavailable": "The message has the system's reason: check the disk of the data directory.",
    "device_unavailable": "`loadledger resources` lists those that there are, and why others cannot be used."
    " Name another, or add `cpu` to the list.",
    "fallback_refused": "The message names the operators. Load it with `fallback` `cpu` to run those on the"
    " CPU, or on another device.",
    "timeout": "The message says what the load waited for. Provide that, or raise `timeout_s`.",
    "no_progress": "The model does not finish to load. If it only needs longer, raise `progress_timeout_s`.",
    "fork_server_died": "The server restarts it and reloads the models that were loaded. Load again.",
    "fork_server_unavailable": "The server restarts it: try again a second later.",
    "repository_unreadable": "The message has the system's reason. Check the mount and the access rights.",
    "repository_busy": "The file system of the model's folder hangs, or too many do, or the server has no"
    " descriptor or thread left. Check the mount and the limits, then try again; other models are"
    " served.",
    "log_unavailable": "Check the disk of the data directory: it may be full or read-only.",
    "unhealthy": "`detail` names the failed checks. If a part cannot recover, the process ends: see its log.",
    "shutting_down": "Retry when the server is up again; accepted jobs continue then.",
    "inference_timeout": "Allow more time (`timeout`, `--inference-timeout-s`), or send less at once.",
    "insufficient_storage": "Free some space on the repository's disk.",
    "unknown_http_version": "Send HTTP/1.1. A proxy in front of the server can take HTTP/2.",
}
"""Advice for each code; the console has that of failed loads, whose message is what `detail` is elsewhere."""

_HEAD = """\
# Errors

Generated from the table of codes; a test keeps it current. Every error has one JSON body (RFC 9457). For
example, for an unknown model:

```json
{"type": "urn:loadledger:error:unknown_model", "title": "No such model", "status": 404,
 "detail": "model 'nothing' is not in the repository", "code": "unknown_model",
 "error": "model 'nothing' is not in the repository"}
```

Programs use `code`, which is stable. `detail` is for people; `error` repeats it for clients of the Open
Inference Protocol. A failed load is not an error of its request: the job's status is `failed`, with one of
these codes and a message, often of ONNX Runtime. `POST /v2/repository/models/{id}/load` waits for the job and
answers with its code.
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
