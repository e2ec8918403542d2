"""Several servers, called nodes, share one ledger and divide its loads.

`server.app` opens a node when `--ledger` names a database. Other packages see it as
`runtime.elsewhere.Elsewhere` and, with it, `server.cluster.Cluster`; a server alone is those classes
themselves. The events of nodes and their fold are in `features.nodes`, since `verify` folds them anywhere.

- `thisnode`: assembles this server as a node: its log, its membership, and its description of itself
- `membership`: joining, leases, nodes that are late, leaving
- `decisions`: the next action of a node; `placement`: the node of a load, and each node's share of the work
- `copies`: which copies of a model are loaded, and which end; `spread`: the copy that answers an inference
- `peers`: which nodes are trusted; `forwarding`: requests about a model that is loaded at another node
- `routes`: list the nodes, and drain one; `check`: the check of the database before a start
- `postgres`: the ledger in PostgreSQL, and this node's replica of it
"""
