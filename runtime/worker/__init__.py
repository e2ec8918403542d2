"""The inside of a worker process, and the only package that imports ONNX Runtime.

The way of a load: `main` reads a `Load` from the data channel; `confine` confines the process, by `landlock`
and `seccomp`; `loading.load` takes the files; `sessions` creates the session, which is run once. The server
hashes and measures.
The way of an inference: `main` reads an `Infer`; `batching` chooses what runs together; `execution` runs it;
`inference` turns tensors into arrays and back.

To change: session options, memory limit: `sessions`. Warm-up: `loading`. Cancellation, answers on the
channel: `execution`. What a worker may do: `confine`. JSON and binary tensors: `inference`.

Every module here is imported by the fork server and shared by all workers: what is imported here costs their
start and memory. A test holds that no HTTP, SQL or asyncio is among it.
"""
