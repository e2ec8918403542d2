"""The inside of a worker process, and the only package that imports ONNX Runtime.

The way of a load: `main` reads a `Load` from the data channel, `confine` confines the process by `landlock`,
`seccomp` and `privileges`, `loading.load` opens the files, `sessions` creates the session, `runtime.rows`
says whether requests may be joined, and `warmup` runs it. The way of an inference: `main` reads an `Infer`,
`batching` chooses what runs together, `execution` runs it, and `inference` converts tensors to arrays and
back, some through `sharedtensors`.

To change: session options, memory limit: `sessions`. Example inputs: `examples`.
Cancellation, answers on the channel: `execution`. Rights of a worker: `confine`. Words for errors:
`refusals`.

The fork server imports every module here, for all workers: each import costs their start and memory. A test
holds that no HTTP, SQL or asyncio is among them.
"""
