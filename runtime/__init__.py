"""Runs models: from the recorded requests to workers that answer inferences. No HTTP, no SQL.

The way of a load: `repository` resolves a version; the `consumer` asks the `scheduler` for the next action
and executes it; `process` starts and supervises workers; `worker` is what runs inside one, and speaks
`wire`. `router` finds the worker of an inference.

To change: which load starts, evictions, reloads: `scheduler`. How an action is carried out and recorded:
`consumer`. Private copies of versions: `store`. Optimised copies of models: `cache`. Memory limits and
measurements: `memory`; CPUs that may be used: `cgroups`; memory that a load will need: `estimates`. File
systems that hang: `filesystem`. A model's `loadledger.toml`: `modeldefaults`. External data: `onnxfile`, and
what it reads of a model: `onnxfields`. Unsafe files: `repository`. The JSON of a request: `requestjson`, and
any other: `strictjson`. When something counts as stuck: `limits`.
Error codes: `errors`.

ONNX Runtime is imported in `worker` only; `worker` imports nothing of `events`.
"""
