// Advice for each error code of the ledger.

const BY_CODE = {
  invalid_model: "ONNX Runtime cannot load the file. Add a valid file as a new version and load it.",
  model_changed: "Its files changed while it was loaded. Load it again when copying has finished.",
  unsafe_file: "One of its files leads out of its folder or is not a regular file. Remove that file, then load again.",
  warm_up_failed: "It loads, but its first inference fails. Read the message and check the inputs of its warm-up.",
  out_of_memory: "It needed more memory than allowed. Raise its memory_limit_bytes, or use a machine with more memory.",
  insufficient_memory: "It does not fit into the memory budget. Unload a model, set --evict idle, or raise --memory-budget.",
  too_many_loaded: "The limit --max-loaded is reached. Unload a model first.",
  timeout: "It was not loaded in time. See what it waited for; load it again or raise timeout_s.",
  no_progress: "It stayed in one stage of its load for too long. If it only needs longer, raise progress_timeout_s, then load it again.",
  crash_loop: "Its workers died too often, so it is not reloaded. Read their last lines, then load another version, or this one again.",
  worker_died: "Its worker died. Read its last lines in the ledger (WorkerExited). If it dies again, load another version.",
  fork_server_died: "The fork server ended. It restarts by itself; the model is not the cause.",
  fork_server_unavailable: "The fork server does not answer. If that lasts, check the machine and restart the server.",
  invalid_defaults: "Its loadledger.toml is invalid. Correct it, then load again.",
  prepare_failed: "It could not be prepared. It loads from its own files.",
  disk_full: "The disk is full. Free some space, then load it again.",
};

export function advice(code) {
  return BY_CODE[code] ?? "Read the reason, then load it again, or load another version.";
}
