"""The consumer: one coroutine that applies the log's requests to workers.

`consumer.Consumer` wakes on an event, a coroutine's end or a timer, asks the scheduler, executes one action,
and decides again. Each load has a coroutine of its own, `loads.Loader.run_load`, which waits for the
consumer's grant and records how the load ends.

To change: what an action does, measurements, pending demand of inferences: `consumer`. The life of a load, of
its workers and files, and of an unload: `loads`; its state meanwhile: `running`. Limits of their growth:
`growth`. What resources and metrics show: `usage`.

Only this package appends outcomes, if the job is unchanged, so each job ends once.
"""
