"""The server's side of worker processes: start, messages, in-flight inferences, and exits.

`pool.WorkerPool.start` asks `forkclient.ForkServer` for a worker; `forkserver`, a process of its own, forks;
`worker.Worker` then owns the two channels and the pidfd until `ended` is set.

To change: environment and descriptors of processes: `forkserver`. The replacement of a fork server: `pool`.
Layers of confinement: `confinement`. Messages to a worker: `worker`; its memory while it loads: `sampling`.
Allowed messages of a worker, deadlines, cancellation, stuck workers: `inflight`. Bytes on the socket:
`channel`. Tensors in shared memory: `sharedmemory`. Signals, exit codes and stderr: `forkclient`; names and
deaths of processes: `prctl`.

Nothing here imports ONNX Runtime; what runs inside a worker is `runtime.worker`.
"""
