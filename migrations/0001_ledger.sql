-- The event log. What is queried by is generated from the body, so it cannot disagree with what is hashed.
-- Idempotency keys are looked up in the log itself: nothing to keep beside it, to expire or to disagree.
CREATE TABLE events (
  position INTEGER PRIMARY KEY AUTOINCREMENT,
  body TEXT NOT NULL CHECK (typeof(body) = 'text'),
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32),
  id TEXT GENERATED ALWAYS AS (json_extract(body, '$.id')) VIRTUAL,
  type TEXT GENERATED ALWAYS AS (json_extract(body, '$.type')) VIRTUAL NOT NULL,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL,
  job_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.job_id')) VIRTUAL,
  actor TEXT GENERATED ALWAYS AS (json_extract(body, '$.actor')) VIRTUAL NOT NULL,
  recorded_at TEXT GENERATED ALWAYS AS (json_extract(body, '$.recorded_at')) VIRTUAL NOT NULL,
  idempotency_key TEXT GENERATED ALWAYS AS (json_extract(body, '$.data.idempotency.key_hash')) VIRTUAL,
  CHECK (json_type(body, '$.position') IS 'integer' AND json_extract(body, '$.position') IS position)
);

-- A request's id is its job's: with a second one, signatures in the log would count for another load.
CREATE UNIQUE INDEX events_by_id ON events (id);
CREATE INDEX events_by_type ON events (type, position);
CREATE INDEX events_by_model ON events (model_id, position) WHERE model_id IS NOT NULL;
CREATE INDEX events_by_job ON events (job_id, position) WHERE job_id IS NOT NULL;
CREATE INDEX events_by_actor ON events (actor, position);
CREATE INDEX events_by_time ON events (recorded_at, position);
CREATE INDEX events_by_idempotency_key ON events (idempotency_key, position)
WHERE idempotency_key IS NOT NULL;
-- Who joined a job is looked up in the log itself, however many joined it.
CREATE INDEX events_by_join ON events (job_id, actor)
WHERE type IN ('LoadJoined', 'UnloadJoined', 'CancelRequested');

-- The past of a model's versions is a fold of these few.
CREATE INDEX events_of_versions ON events (model_id, position)
WHERE type IN (
  'VersionAdded', 'VersionRemoved', 'LabelSet', 'LabelRemoved', 'VersionApproved', 'ApprovalWithdrawn'
);

-- Without this one, INSERT OR REPLACE would overwrite an event silently.
CREATE TRIGGER events_only_at_head BEFORE INSERT ON events
WHEN NEW.position IS NOT coalesce((SELECT max(position) FROM events), 0) + 1
BEGIN
  SELECT RAISE(ABORT, 'an event can only be appended at the head of the log');
END;

CREATE TRIGGER events_never_change BEFORE UPDATE ON events
BEGIN
  SELECT RAISE(ABORT, 'events are never changed');
END;

CREATE TRIGGER events_never_go BEFORE DELETE ON events
BEGIN
  SELECT RAISE(ABORT, 'events are never deleted');
END;

-- The projections, written in the transaction of their events; the position that they reflect, and the version
-- of the folds that made them: other folds make them anew.
-- An ended job has a landmark: the roundest of the positions after which it had not ended (`events.history`).
CREATE TABLE jobs (
  created_position INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  body TEXT NOT NULL,
  landmark INTEGER,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL NOT NULL,
  status TEXT GENERATED ALWAYS AS (json_extract(body, '$.status')) VIRTUAL NOT NULL
);

CREATE INDEX jobs_by_model ON jobs (model_id, created_position);
CREATE INDEX jobs_by_status ON jobs (status, created_position);
CREATE INDEX jobs_by_landmark ON jobs (landmark) WHERE landmark IS NOT NULL;

-- With rowids: without, what is longer than a kilobyte goes to a page of its own, written at each change.
CREATE TABLE models (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The tokens that were issued or revoked and matter still.
CREATE TABLE tokens (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The nodes that share the ledger.
CREATE TABLE nodes (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The policy for loads that is in force at each node; of a server alone its id is empty.
CREATE TABLE policies (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The versions of each model: added, removed, held by nodes, named by labels, approved.
CREATE TABLE versions (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

CREATE TABLE projected (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  position INTEGER NOT NULL,
  folds INTEGER NOT NULL
);

INSERT INTO projected (one, position, folds) VALUES (1, 0, 10);

-- Hints outside the log: when each model was last used, and when the server was last alive.
CREATE TABLE last_used (
  model_id TEXT PRIMARY KEY,
  used_at TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE last_seen (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  seen_at TEXT NOT NULL
);

-- Each change of a model: what the API shows of it after the event at the position. Files and memory of its load
-- are in the event at body's `load`. is_common is 1 where the event is no event of the model: at starts and ends
-- of servers and nodes. The other rows are found through events_by_model.
CREATE TABLE model_history (
  position INTEGER NOT NULL,
  model_id TEXT NOT NULL,
  is_common INTEGER NOT NULL,
  body TEXT NOT NULL,
  PRIMARY KEY (position, model_id)
) STRICT, WITHOUT ROWID;

CREATE INDEX model_history_by_model ON model_history (model_id, position) WHERE is_common;

-- Each change of the server's state, which has no node_id, and of a node's. seen_at is until when the state before
-- is known to have lasted; null is until the event. A node that is forgotten has no state.
CREATE TABLE presence (
  position INTEGER NOT NULL,
  node_id TEXT NOT NULL,
  state TEXT,
  at TEXT,
  seen_at TEXT,
  PRIMARY KEY (node_id, position)
) STRICT, WITHOUT ROWID;

CREATE INDEX presence_by_position ON presence (position);
