"""Runs models: from the recorded requests to workers that answer inferences. No HTTP, no SQL.

The way of a load: `repository` resolves a version; the `consumer` asks the `scheduler` for the next action
and executes it; `process` starts and supervises workers; `worker` is what runs inside one, and speaks
`wire`. `router` finds the worker of an inference; `elsewhere` knows what other servers do.

To change: which load starts, evictions, reloads, and the memory that a load will need: `scheduler`. What a
load takes beside the machine's memory, as features have it: `rooms`. The life
of a load, and what is recorded of it: `consumer`. Private copies of versions: `store`; versions that callers
add or remove: `uploads`. Memory limits and measurements: `memory`; CPUs that may be used: `cgroups`.
Models and versions, unsafe files, file systems that hang, a
model's `loadledger.toml`: `repository`. External data: `onnxfile`, and what it reads of a model:
`onnxfields`. The JSON of a request: `requestjson`, and any other: `strictjson`. When something counts as
stuck: `timeouts`. Counts and times of inferences: `statistics`. Error codes: `errors`.

ONNX Runtime is imported in `worker` only; `worker` imports nothing of `events`.
"""
