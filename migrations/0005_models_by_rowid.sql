-- Models with rowids: without, what is longer than a kilobyte goes to a page of its own, written at each change.
ALTER TABLE models RENAME TO models_before;

CREATE TABLE models (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

INSERT INTO models (id, body) SELECT id, body FROM models_before ORDER BY id;

DROP TABLE models_before;
