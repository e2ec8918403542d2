// Advice for each error code of the ledger, and what several models with the same one are said to be.

const BY_CODE = {
  invalid_model: "ONNX Runtime cannot load the file. Add a valid file as a new version and load it.",
  model_changed: "Its files changed while it was loaded. Load it again when copying has finished.",
  unsafe_file: "One of its files leads out of its folder or is not a regular file. Remove that file, then load again.",
  warm_up_failed: "It loads, but its first inference fails. Read the message and check the inputs of its warm-up.",
  out_of_memory: "It needed more memory than allowed. Load it with a higher memory_limit_bytes, or use a machine with more memory.",
  insufficient_memory: "It does not fit into the memory budget. Unload a model. Or start the server with --evict idle, or with a higher --memory-budget.",
  too_many_loaded: "As many models are loaded as the server's option --max-loaded allows. Unload one first.",
  timeout: "It was not loaded in time. See what it waited for; load it again or with a higher timeout_s.",
  no_progress: "It stayed in one stage of its load for too long. If it only needs longer, load it with a higher progress_timeout_s.",
  crash_loop: "Its workers died too often, so it is not reloaded. Read their last lines, then load another version, or this one again.",
  worker_died: "Its worker died. Read its last lines on the model's page. If it dies again, load another version.",
  fork_server_died: "The fork server ended. It restarts by itself; the model is not the cause.",
  fork_server_unavailable: "The fork server does not answer. If that lasts, check the machine and restart the server.",
  invalid_defaults: "Its loadledger.toml is invalid. Correct it, then load again.",
  prepare_failed: "It could not be prepared. It loads from its own files.",
  disk_full: "The disk is full. Free some space, then load it again.",
};

const OF_MANY = {
  invalid_model: "are not valid ONNX",
  model_changed: "changed while they were loaded",
  unsafe_file: "have an unsafe file",
  warm_up_failed: "fail at their first inference",
  out_of_memory: "need more memory than allowed",
  insufficient_memory: "do not fit into the memory budget",
  too_many_loaded: "exceed the limit on loaded models",
  timeout: "were not loaded in time",
  no_progress: "made no progress while loading",
  crash_loop: "crash again and again",
  worker_died: "lost their worker",
  fork_server_died: "failed with the fork server",
  fork_server_unavailable: "failed for want of the fork server",
  invalid_defaults: "have an invalid loadledger.toml",
  disk_full: "failed because the disk is full",
};

export function advice(code) {
  return BY_CODE[code] ?? "Read the reason, then load it again, or load another version.";
}

// "8 models" … "are not valid ONNX".
export const ofMany = (code) => OF_MANY[code] ?? `failed (${code})`;
