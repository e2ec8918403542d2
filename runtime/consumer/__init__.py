"""The consumer: one coroutine that applies the log's requests to workers.

The way of a request: `consumer.Consumer` wakes on an event, an outcome or a timer, asks the scheduler, and
has `executor.Executor` execute one action: facts in the log, and tasks on a `loads.RunningLoad`. A task
stores its outcome there and wakes the consumer, which decides again.

To change: periodic measuring and wake-ups: `consumer`. What an action does: `executor`; what it records:
`drafts`. The live side of a load, how its workers load, drain and stop, and why it failed: `loads`.
The files of a load: `loadfiles`. What resources and metrics show, pending demand of inferences: `usage`.

Only this package appends outcomes, so each job ends once.
"""
