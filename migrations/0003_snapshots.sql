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

-- A ledger that is older than its snapshots gets them together with its projections.
UPDATE projected SET folds = 0;
