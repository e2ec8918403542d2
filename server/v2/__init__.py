"""The Open Inference Protocol v2, with Triton's extensions.

An inference arrives on the fast path, or through the router, in `inference.infer`. `runtime.router.Router`
resolves its target: a load here, another server, which is asked, or none, and `ondemand` loads the
model and waits. It is decoded by `codec`, run by a worker, and encoded again.

- `inference`: infer, metadata and readiness of a model; the fast path past aiohttp's router and middlewares
- `codec`: requests and responses, JSON and binary
- `ondemand`: on-demand loads, with back-off after failures
- `metadata`: schemas of the protocol; server metadata, statistics, configuration
- `repository`: the repository extension: index, load and unload, which wait for the job's end
- `tritonconfig`: Triton's model configuration, of a model and of a load
"""
