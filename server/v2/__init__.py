"""The Open Inference Protocol v2, with Triton's extensions.

An inference arrives on the fast path, or through the router, in `inference.infer`. It is decoded by `codec`,
run by `runtime.router.Router`, and encoded again. If its model is not loaded, `ondemand` loads it and waits.

- `inference`: infer, metadata and readiness of a model
- `fastpath`: inferences past aiohttp's router and middlewares
- `forwarding`: requests about a model that is loaded at another node
- `codec`: requests and responses, JSON and binary
- `ondemand`: on-demand loads, with back-off after failures
- `metadata`: schemas of the protocol; server metadata, statistics, configuration
- `repository`: the repository extension: index, load and unload, which wait for the job's end
- `tritonconfig`: Triton's model configuration, of a model and of a load
"""
