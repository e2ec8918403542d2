-- The tokens that were issued or revoked and matter still: a projection, in the transaction of its events.
CREATE TABLE tokens (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);

-- The tokens at the base, which archived events issued or revoked: a part of the state there.
CREATE TABLE base_tokens (
  id TEXT NOT NULL PRIMARY KEY,
  body TEXT NOT NULL
);
