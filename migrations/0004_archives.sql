-- Where events went that are no longer here: one row for each archive, in the transaction that moved the base.
-- sha256 is the file's, state_sha256 that of the snapshot at the base, which stands for those events here.
CREATE TABLE archives (
  last_position INTEGER PRIMARY KEY,
  first_position INTEGER NOT NULL,
  hash BLOB NOT NULL CHECK (typeof(hash) = 'blob' AND length(hash) = 32),
  archived_at TEXT NOT NULL,
  file TEXT NOT NULL,
  sha256 BLOB NOT NULL CHECK (typeof(sha256) = 'blob' AND length(sha256) = 32),
  state_sha256 BLOB NOT NULL CHECK (typeof(state_sha256) = 'blob' AND length(state_sha256) = 32)
);
