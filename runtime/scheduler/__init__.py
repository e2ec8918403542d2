"""The scheduler: a pure function from recorded state and running loads to the next action.

The way of a decision: `scheduler.decide` takes a `view.SchedulerView` and asks one concern after the other:
forced unloads, cancellations, exits of workers, unloads, `admission.admit` for pending loads, whose action
comes after timeouts and reloads, and `eviction.find_automatic_unload`. The first action wins; `actions` lists
all of them, and the facts that they record. The inner life of one load is its coroutine's
(`runtime.consumer.loads`).

To change: the order of concerns, back-off, crash loops: `scheduler`. Priorities, reserved room, the memory
budget, swap strategies: `admission`. What a load needs: `estimates`. Victims,
idle timeouts: `eviction`. What a decision can see: `view`.

Nothing here reads a clock, does I/O or logs. The consumer carries actions out and calls `decide` again.
"""
