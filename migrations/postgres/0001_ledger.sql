-- The event log of several servers. Each keeps a replica with the projections, so the database has the events alone.
-- The schema `loadledger` is the search path here; `loadledger migrate` applies this as the schema's owner.
CREATE TABLE events (
  position bigint PRIMARY KEY,
  body text NOT NULL,
  hash bytea NOT NULL CHECK (octet_length(hash) = 32)
);

-- Where the chain begins: the last archived event, at first position 0 and 32 zero bytes.
CREATE TABLE base (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  position bigint NOT NULL CHECK (position >= 0),
  hash bytea NOT NULL CHECK (octet_length(hash) = 32)
);

INSERT INTO base (position, hash) VALUES (0, decode(repeat('00', 32), 'hex'));

-- The last event. Its row is the lock that puts appends in order.
CREATE TABLE head (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  position bigint NOT NULL CHECK (position >= 0),
  hash bytea NOT NULL CHECK (octet_length(hash) = 32),
  recorded_at text NOT NULL
);

INSERT INTO head (position, hash, recorded_at) SELECT position, hash, '' FROM base;

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'events are never changed or deleted';
END
$$;

CREATE TRIGGER events_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events
EXECUTE FUNCTION refuse_change();

CREATE TRIGGER base_never_changes BEFORE UPDATE OR DELETE OR TRUNCATE ON base
EXECUTE FUNCTION refuse_change();

-- Append events after a head, in one transaction: 'appended', or 'moved' if the head is another one.
--
-- The chain, the positions and the order of the times are checked here, so that no server can write a log that does
-- not verify. What the chain does not prove, that a body is canonical JSON, is the servers' and the verifiers' part.
CREATE FUNCTION append(after_position bigint, after_hash bytea, bodies text[], hashes bytea[]) RETURNS text
LANGUAGE plpgsql STRICT SECURITY DEFINER SET search_path = loadledger, pg_temp AS $$
DECLARE
  tip head%ROWTYPE;
  wrong bigint;
  last_hash bytea;
  last_at text;
BEGIN
  SELECT * INTO STRICT tip FROM head FOR UPDATE;
  IF tip.position <> after_position OR tip.hash <> after_hash THEN
    RETURN 'moved';
  END IF;
  IF cardinality(bodies) = 0 OR cardinality(bodies) <> cardinality(hashes) THEN
    RAISE EXCEPTION 'there must be as many hashes as events, at least one';
  END IF;
  WITH given AS (
    SELECT number, body, hash, body::json AS parsed
    FROM unnest(bodies, hashes) WITH ORDINALITY AS rows (body, hash, number)
  ), linked AS (
    SELECT
      number, body, hash,
      lag(hash, 1, after_hash) OVER (ORDER BY number) AS previous,
      parsed ->> 'position' AS said,
      parsed ->> 'recorded_at' AS at,
      lag(parsed ->> 'recorded_at', 1, tip.recorded_at) OVER (ORDER BY number) AS before
    FROM given
  ), inserted AS (
    INSERT INTO events (position, body, hash)
    SELECT after_position + number, body, hash FROM linked ORDER BY number
  )
  SELECT
    min(number) FILTER (
      WHERE hash IS DISTINCT FROM sha256(previous || convert_to(body, 'UTF8'))
      OR said IS DISTINCT FROM (after_position + number)::text
      OR at IS NULL
      OR at COLLATE "C" < before COLLATE "C"
    ),
    (array_agg(hash ORDER BY number DESC))[1],
    (array_agg(at ORDER BY number DESC))[1]
  INTO wrong, last_hash, last_at
  FROM linked;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'event % does not follow: hash, position or time', after_position + wrong;
  END IF;
  UPDATE head SET position = after_position + cardinality(bodies), hash = last_hash, recorded_at = last_at;
  PERFORM pg_notify('loadledger', '');
  RETURN 'appended';
END
$$;

-- Lock the head until the transaction ends: the next append cannot be refused as 'moved'.
CREATE FUNCTION lock_head() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = loadledger, pg_temp AS $$
  SELECT FROM head FOR UPDATE
$$;

-- Commit a transaction that changes nothing, to see whether the ledger can be written.
CREATE FUNCTION probe() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = loadledger, pg_temp AS $$
  UPDATE head SET position = position
$$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA loadledger FROM PUBLIC;
