-- When the server last noted that it was there, and was alive: outside the log, at least once a minute.
CREATE TABLE last_seen (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  seen_at TEXT NOT NULL
);

-- By which folds the state at the base was made; 0: by those of an earlier release. It stays as it was archived.
ALTER TABLE archives ADD COLUMN folds INTEGER NOT NULL DEFAULT 0;
