"""Runs models: from recorded requests to workers that answer inferences. No HTTP, no SQL.

The way of a load: `repository` resolves a version, the `scheduler` decides what happens next, the `consumer`
does it, `store` holds the files, and `process` starts a worker, which runs `worker`; both speak `wire`. Then
the `router` finds the load for an inference, and `lostmodels` says how one lost it.

To change:

- which load starts, evictions, reloads, estimates: `scheduler`; what a load takes, and where: `rooms`
- the life of a load, and its facts: `consumer`
- models, versions, `loadledger.toml`, file systems that hang: `repository`; external data: `onnxfile`, which
  reads by `onnxfields`; private copies: `store`; versions that callers add or remove: `uploads`
- whether rows of a batch change each other's answers: `rows`, which reads graphs by `onnxgraph`
- memory limits and measurements: `memory`; the parts of a container's memory: `memoryplan`; usable CPUs:
  `cgroups`; time limits: `timeouts`
- the JSON of inference requests: `requestjson`; any other JSON: `strictjson`
- work and models of other servers: `elsewhere`
- counts and times of inferences: `statistics`; error codes: `errors`

ONNX Runtime is imported in `worker` only; `worker` imports nothing of `events`.
"""
