-- The nodes that share the ledger, as their events say: a projection, in the transaction of its events.
CREATE TABLE nodes (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The nodes at the base, which archived events name: a part of the state there.
CREATE TABLE base_nodes (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);
