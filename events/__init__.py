"""The ledger: event types, the hash-chained log, projections, tails. Proof is in `audit`, SQL in `sqlite`.

The way of a command: `log` queues it, `accept` has it decide itself on the `state`, `codec` writes its events
as canonical JSON and chains their hashes, `sqlite.storage` commits a group, and `tail` wakes the readers.

To change:

- an event's members: `types` and `values`; its words: `eventtext`; its metrics: `counters`
- the projections: the folds `jobs`, `models` with `serving`, `versions`, `registers` and `tokens`
- which commands are accepted: `jobcommands`, `versioncommands`, `registercommands`, on the base of
  `commands`; conditions and idempotency keys: `accept`
- rows of the past: `history` and `presence`
- groups of events, and failures of writing: `log`, which knows the ledger as a `storage`
- times and ids: `clock`; atomic files: `files`; refusals: `errors`; texts that servers sign: `statements`

Features add facts and folds by the lists of `features`. No HTTP, no ONNX, nothing of `runtime` or `server`.
"""
