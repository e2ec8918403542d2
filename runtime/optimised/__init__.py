"""Optimised models: copies of versions that load faster, and whose workers share their weights.

The way of one: after a load without one, the consumer offers the version to `optimiser.Optimiser`. When the
scheduler allows it, a worker writes the optimised model into a draft; `trial` compares it with the original
in fresh processes, once; `store.OptimisedStore` keeps it under its `key`, in the folder of `runtime.store`.
The next load of the same bytes asks `Optimiser.find`. A bad one is remembered by its key for a day.

To change: what an optimised model depends on: `key`. What is recorded, eviction, disk space: `store`. When
one is good enough, and pacing: `trial`. The queue and its outcomes: `optimiser`. How a worker makes one:
`runtime.worker.optimising`.

In the API, commands, events and metrics it is called `prepared`.
"""
