"""The scheduler: a pure function from recorded state and running loads to the next action.

The way of a decision: `scheduler.decide` builds a `view.SchedulerView` and asks one concern after the
other: forced unloads, cancellations, exits of workers, unloads, timeouts, reloads, moves off a draining node,
`placement.place_loads`, then `admission.admit` for pending loads and `eviction.find_automatic_unload`. The
first action wins; `actions` lists all of them, and the facts that they record. The inner life of one load is
its coroutine's (`runtime.consumer.loads`).

To change: the order of concerns, back-off, crash loops: `scheduler`. Priorities, reserved room, the memory
budget and what a load needs of it, swap strategies: `admission`. Which node runs a load: `placement`.
Victims, idle timeouts: `eviction`. What a decision can see: `view`.

Nothing here reads a clock, does I/O or logs. The consumer carries actions out and calls `decide` again.
"""
