"""Several servers, called nodes, share one ledger and divide its loads.

`server.app` opens it when `--ledger` names a database; a server alone has only its routes, which list no
node. Other packages see it as `runtime.elsewhere.Elsewhere` and, with it, `server.cluster.Cluster`.

The events of nodes and their fold are in `features.nodes`, since `verify` folds them wherever a ledger is.

- `thisnode`: this server as a node: its log, its membership, and what it says of itself
- `membership`: joining, leases, nodes that are late, leaving
- `placement`: which node runs a load, and each node's share of the work
- `copies`: which copies of a model are loaded, and which end
- `decisions`: the next action of a node
- `peers`: which nodes are trusted, and the tokens of what they forward
- `forwarding`: requests about a model that is loaded at another node
- `spread`: which of several copies answers an inference
- `routes`: list the nodes, and drain one
- `check`: the check of the database before a start
- `postgres`: the ledger in PostgreSQL, and this node's replica of it
"""
