"""The features, each in a folder of its own, and the lists by which they enter the product.

The kernel (the log, the scheduler, the consumer, workers, the store) knows no feature. It imports the lists
of this folder, one for each seam, with one line for each feature that is there:

- `facts`: events, and evidence of checks; `folds`: beside those of models, of versions and of registers
- `acceptance`: conditions of a request for a load, which refuse it before anything is recorded
- `commands`: rules for loads of a cause, names that loads set
- `checks`: checks before a load, which get a `beforeload.CheckInput` and pass with evidence
- `rooms`: targets of a load, what it needs there, and what it demands of its server
- `wire`, `targets` and `providers`: targets beside the CPU, in messages, in the pool and in a worker
- `server`: setup, parameters of loads, members of answers, metrics, notices
- `rules` and `policyfile`: the operator's policy; `audit`: loads checked against it again

The features are `signatures`, `approvals`, `labels`, `devices`, `ondemand` loads, `nodes`, `records`,
`notify`, and `grpc`, which needs none of the lists.

A new feature is its folder and a line in each list that it uses. Its modules may import whatever lies below
the seam that they serve, so `events` never reaches a feature's routes.
"""
