// What to do about what went wrong, by the code that the ledger has for it.

const BY_CODE = {
  invalid_model: "The file is no model that ONNX Runtime can load. Put a right one there, as a new version, and load that.",
  model_changed: "Its files changed while it was loaded. When the copy is complete, load it again.",
  unsafe_file: "A file of it leads out of its folder, or is no plain file. Remove it from the repository, then load again.",
  warm_up_failed: "It loads, but its first inference fails: look at the message, and at its inputs.",
  out_of_memory: "It took more than it may. Raise its memory_limit_bytes, or give it a machine with more memory.",
  insufficient_memory: "It does not fit into the memory budget. Unload something, let --evict idle do so, or raise --memory-budget.",
  too_many_loaded: "As many models are loaded as --max-loaded allows. Unload one first.",
  timeout: "It was not loaded in time. Look at what it waited for, then load it again, or give it a longer timeout_s.",
  crash_loop: "It kept dying and is not tried any more. Read its last lines, then load another version, or this one again.",
  worker_died: "Its process ended. Read its last lines in the ledger (WorkerExited); if it dies again, go back to another version.",
  fork_server_died: "The process that starts workers ended, which says nothing against the model. It comes back by itself.",
  fork_server_unavailable: "The process that starts workers does not answer. If that stays so, look at the machine, then start the server again.",
  invalid_defaults: "Its loadledger.toml is not what it has to be: mend it, then load again.",
  prepare_failed: "Its prepared form could not be made. It loads from its own files.",
  disk_full: "The disk is full. Make room, then load it again.",
};

export function advice(code) {
  return BY_CODE[code] ?? "Read the reason, then load it again, or load another version.";
}
