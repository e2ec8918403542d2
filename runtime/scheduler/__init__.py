"""The scheduler: a pure function from recorded state and running loads to the next action.

`scheduler.decide` takes a `view.SchedulerView` and asks one concern after the other: forced unloads,
cancellations, exits of workers, unloads, timeouts and reloads, `admission.admit` for pending loads, and
`eviction.find_automatic_unload`. The first action wins; `actions` has all of them, and the facts that they
record. The inner life of one load is its coroutine's (`runtime.consumer.loads`).

To change: the order of concerns, back-off, crash loops: `scheduler`. Priorities, rooms, swap strategies:
`admission`. What a load needs: `estimates`. Victims, idle timeouts: `eviction`. The input of a decision:
`view`.

Nothing here reads a clock, does I/O or logs. The consumer carries actions out and calls `decide` again.
"""
