"""The server's side of worker processes: start, messages, in-flight inferences, and exits.

The way of a worker: `pool.WorkerPool.start` asks `forkclient.ForkServer` for one; `forkserver`, a process of
its own, forks; `worker.Worker` then owns the two channels and the pidfd until `ended` is set.

To change: how processes are forked, their environment and descriptors: `forkserver`. When a fork server is
replaced: `pool`. What the workers' confinement does not prevent: `confinement`. Messages to a worker:
`worker`; the memory of loading ones: `sampling`. What a worker may say, and when, deadlines, cancellation and
stuck workers: `inflight`. Bytes on the socket, their budget, and busy-polling: `channel`. Signals, exit codes
and stderr: `forkclient`.

Nothing here imports ONNX Runtime; what runs inside a worker is `runtime.worker`.
"""
