-- Idempotency keys are looked up in the log itself: nothing to keep beside it, to expire or to disagree.
ALTER TABLE events ADD COLUMN
  idempotency_key TEXT GENERATED ALWAYS AS (json_extract(body, '$.data.idempotency.key_hash')) VIRTUAL;

CREATE INDEX events_by_idempotency_key ON events (idempotency_key, position)
WHERE idempotency_key IS NOT NULL;

-- By which folds the projections were made; other ones make them anew. 0: by those of an earlier release.
ALTER TABLE projected ADD COLUMN folds INTEGER NOT NULL DEFAULT 0;

-- When each model was last used, as far as somebody noted it: a hint, no part of the log or the projections.
CREATE TABLE last_used (
  model_id TEXT PRIMARY KEY,
  used_at TEXT NOT NULL
) WITHOUT ROWID;
