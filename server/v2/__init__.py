"""The Open Inference Protocol v2, with Triton's extensions.

An inference arrives on the fast path, or through the router, in `inference.infer`. `runtime.router.Router`
resolves its target: a load here, another server, or none, and then on-demand loads may load the model.
`codec` decodes the request, a worker runs it, and `codec` encodes the answer.

- `inference`: inference, metadata and readiness of a model; the fast path past aiohttp's router
- `codec`: requests and responses, JSON and binary
- `metadata`: schemas of the protocol; server metadata, statistics, configuration
- `repository`: the repository extension: index, load and unload, which wait for the job's end
- `tritonconfig`: Triton's model configuration, of a model and of a load
"""
