-- The event log. What is queried by is generated from the body, so it cannot disagree with what is hashed.
CREATE TABLE events (
  position INTEGER PRIMARY KEY AUTOINCREMENT,
  body TEXT NOT NULL CHECK (typeof(body) = 'text'),
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32),
  type TEXT GENERATED ALWAYS AS (json_extract(body, '$.type')) VIRTUAL NOT NULL,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL,
  job_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.job_id')) VIRTUAL,
  actor TEXT GENERATED ALWAYS AS (json_extract(body, '$.actor')) VIRTUAL NOT NULL,
  recorded_at TEXT GENERATED ALWAYS AS (json_extract(body, '$.recorded_at')) VIRTUAL NOT NULL,
  CHECK (json_type(body, '$.position') IS 'integer' AND json_extract(body, '$.position') IS position)
);

CREATE INDEX events_by_type ON events (type, position);
CREATE INDEX events_by_model ON events (model_id, position) WHERE model_id IS NOT NULL;
CREATE INDEX events_by_job ON events (job_id, position) WHERE job_id IS NOT NULL;
CREATE INDEX events_by_actor ON events (actor, position);
CREATE INDEX events_by_time ON events (recorded_at, position);

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

-- The projections, written in the transaction of their events, and the position that they reflect.
CREATE TABLE jobs (
  created_position INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  body TEXT NOT NULL,
  model_id TEXT GENERATED ALWAYS AS (json_extract(body, '$.model_id')) VIRTUAL NOT NULL,
  status TEXT GENERATED ALWAYS AS (json_extract(body, '$.status')) VIRTUAL NOT NULL
);

CREATE INDEX jobs_by_model ON jobs (model_id, created_position);
CREATE INDEX jobs_by_status ON jobs (status, created_position);

CREATE TABLE models (
  id TEXT PRIMARY KEY,
  body TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE projected (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  position INTEGER NOT NULL
);

INSERT INTO projected (one, position) VALUES (1, 0);
