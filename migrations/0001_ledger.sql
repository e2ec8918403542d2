-- The event log. What is queried by is generated from the body, so it cannot disagree with what is hashed.
-- Idempotency keys are looked up in the log itself: nothing to keep beside it, to expire or to disagree.
CREATE TABLE events (
  position INTEGER PRIMARY KEY AUTOINCREMENT,
  body TEXT NOT NULL CHECK (typeof(body) = 'text'),
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32),
  type TEXT GENERATED ALWAYS AS (json_extract(body, '$.type')) VIRTUAL NOT NULL,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL,
  job_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.job_id')) VIRTUAL,
  actor TEXT GENERATED ALWAYS AS (json_extract(body, '$.actor')) VIRTUAL NOT NULL,
  recorded_at TEXT GENERATED ALWAYS AS (json_extract(body, '$.recorded_at')) VIRTUAL NOT NULL,
  idempotency_key TEXT GENERATED ALWAYS AS (json_extract(body, '$.data.idempotency.key_hash')) VIRTUAL,
  CHECK (json_type(body, '$.position') IS 'integer' AND json_extract(body, '$.position') IS position)
);

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

-- Where chain and rebuild begin: the last archived event, at first position 0 and 32 zero bytes.
CREATE TABLE base (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  position INTEGER NOT NULL CHECK (position >= 0),
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32)
);

INSERT INTO base (one, position, hash) VALUES (1, 0, zeroblob(32));

-- Without this one, INSERT OR REPLACE would overwrite an event silently.
CREATE TRIGGER events_only_at_head BEFORE INSERT ON events
WHEN NEW.position IS NOT coalesce((SELECT max(position) FROM events), (SELECT position FROM base)) + 1
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

-- INSERT OR REPLACE deletes without firing the trigger on DELETE.
CREATE TRIGGER base_is_one BEFORE INSERT ON base
WHEN EXISTS (SELECT 1 FROM base)
BEGIN
  SELECT RAISE(ABORT, 'the base of the chain is never replaced');
END;

CREATE TRIGGER base_never_changes BEFORE UPDATE ON base
BEGIN
  SELECT RAISE(ABORT, 'the base of the chain is never changed');
END;

CREATE TRIGGER base_never_goes BEFORE DELETE ON base
BEGIN
  SELECT RAISE(ABORT, 'the base of the chain is never deleted');
END;

-- The projections, written in the transaction of their events; the position that they reflect, and the version
-- of the folds that made them: other folds make them anew.
CREATE TABLE jobs (
  created_position INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  body TEXT NOT NULL,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL NOT NULL,
  status TEXT GENERATED ALWAYS AS (json_extract(body, '$.status')) VIRTUAL NOT NULL
);

CREATE INDEX jobs_by_model ON jobs (model_id, created_position);
CREATE INDEX jobs_by_status ON jobs (status, created_position);

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

CREATE TABLE projected (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  position INTEGER NOT NULL,
  folds INTEGER NOT NULL
);

INSERT INTO projected (one, position, folds) VALUES (1, 0, 2);

-- Hints outside the log: when each model was last used, and when the server was last alive.
CREATE TABLE last_used (
  model_id TEXT PRIMARY KEY,
  used_at TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE last_seen (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  seen_at TEXT NOT NULL
);

-- The live state at some positions, so that any moment of the past is folded from near by. What the log says of
-- it counts: these are forgotten and made anew with the projections.
CREATE TABLE snapshots (
  position INTEGER PRIMARY KEY
);

-- Of each model only what differs from its row before: a snapshot has, of each, the latest row up to there.
CREATE TABLE model_snapshots (
  model_id TEXT NOT NULL,
  position INTEGER NOT NULL,
  body TEXT NOT NULL,
  UNIQUE (model_id, position)
);

-- All jobs that had not ended.
CREATE TABLE job_snapshots (
  position INTEGER NOT NULL,
  created_position INTEGER NOT NULL,
  body TEXT NOT NULL,
  UNIQUE (position, created_position)
);

-- The tokens and nodes at the base, which archived events name: a part of the state there.
CREATE TABLE base_tokens (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

CREATE TABLE base_nodes (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- Where events went that are no longer here: one row for each archive, in the transaction that moved the base.
-- sha256 is the file's, state_sha256 that of the state at the base, which stands for those events here and stays
-- as it was archived: folds is the version of the folds that made it.
CREATE TABLE archives (
  last_position INTEGER PRIMARY KEY,
  first_position INTEGER NOT NULL,
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32),
  archived_at TEXT NOT NULL,
  file TEXT NOT NULL,
  sha256 BLOB NOT NULL CHECK (typeof(sha256) = 'blob' AND length(sha256) = 32),
  state_sha256 BLOB NOT NULL CHECK (typeof(state_sha256) = 'blob' AND length(state_sha256) = 32),
  folds INTEGER NOT NULL
);
