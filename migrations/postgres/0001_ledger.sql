-- The event log of several servers. Each keeps a replica with the projections, so the database has the events alone.
-- The schema `loadledger` is the search path here; `loadledger migrate` applies this as the schema's owner.
CREATE TABLE events (
  position bigint PRIMARY KEY,
  body text NOT NULL,
  hash bytea NOT NULL CHECK (octet_length(hash) = 32)
);

-- A request's id is its job's: with a second one, signatures in the log would count for another load.
CREATE UNIQUE INDEX events_by_id ON events ((replace(body, '\u0000', '\u0001')::json ->> 'id'));

-- The last event. Its row is the lock that puts appends in order.
CREATE TABLE head (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  position bigint NOT NULL CHECK (position >= 0),
  hash bytea NOT NULL CHECK (octet_length(hash) = 32),
  recorded_at text NOT NULL
);

INSERT INTO head (position, hash, recorded_at) VALUES (0, decode(repeat('00', 32), 'hex'), '');

-- The servers of this ledger, as their renewals say; what they are and have is in the events. A node's facts are taken
-- while its epoch lasts. Only this database's clock says that a node is late. `instance` names the process that joined.
CREATE TABLE nodes (
  node_id text PRIMARY KEY,
  epoch bigint NOT NULL,
  ended boolean NOT NULL DEFAULT false,
  lease_s double precision NOT NULL CHECK (lease_s > 0),
  renewed_at timestamptz NOT NULL,
  steady_since timestamptz NOT NULL,
  hints text NOT NULL DEFAULT '{}',
  instance text NOT NULL DEFAULT ''
);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'events are never changed or deleted';
END
$$;

-- `loadledger discard` lifts it for its transaction. To disable it would lock the table, and keep servers waiting.
CREATE TRIGGER events_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON events
WHEN (current_setting('loadledger.discarding', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION refuse_change();

-- Append events after a head, in one transaction: 'appended', or 'moved' if the head is another one.
-- Raises LL001 if the epoch of the node that appends is over, LL002 if the events say that a node is lost which is not
-- late, or which this node may not judge.
--
-- The chain, the positions, the order of the times and the members around the data are checked here, so that no server
-- can write a log that does not verify, or that the others cannot read. What a type's data are is the servers' part, and
-- that they are canonical JSON also the verifiers'. A join is refused after another event than that whose hash it has.
-- Reading a member of a text with \u0000 in it is an error, whichever member has it, so it is read as \u0001.
--
-- A writer that is no node, such as a command, has null for its node; a node that has not joined yet, for its epoch.
CREATE FUNCTION append(
  after_position bigint, after_hash bytea, bodies text[], hashes bytea[], node text, node_epoch bigint, lease_s float8
) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = loadledger, pg_temp AS $$
DECLARE
  tip head%ROWTYPE;
  wrong bigint;
  last_hash bytea;
  last_at text;
  of_nodes json[];
BEGIN
  SELECT * INTO STRICT tip FROM head FOR UPDATE;
  IF tip.position IS DISTINCT FROM after_position OR tip.hash IS DISTINCT FROM after_hash THEN
    RETURN 'moved';
  END IF;
  IF coalesce(cardinality(bodies), 0) = 0 OR cardinality(bodies) IS DISTINCT FROM cardinality(hashes) THEN
    RAISE EXCEPTION 'there must be as many hashes as events, at least one';
  END IF;
  SELECT array_agg(replace(body, '\u0000', '\u0001')::json) INTO of_nodes
  FROM unnest(bodies) AS body WHERE body LIKE '%"type":"Node%';
  PERFORM check_epochs(of_nodes, node, node_epoch, lease_s);
  WITH given AS (
    SELECT number, body, hash, position::text AS said, recorded_at #>> '{}' AS at, data, type,
      replace(body, '\u0000', '\u0001') = concat(
        '{"actor":', actor, ',"data":', data, ',"id":', id, ',"job_id":', coalesce(job_id, 'null'),
        ',"model_id":', coalesce(model_id, 'null'), ',"position":', position, ',"recorded_at":', recorded_at,
        ',"schema":', schema, ',"type":', type, ',"version":', coalesce(version, 'null'),
        ',"worker_id":', coalesce(worker_id, 'null'), '}'
      )
      AND (json_typeof(actor), json_typeof(data), json_typeof(id)) = ('string', 'object', 'string')
      AND coalesce(json_typeof(job_id), 'string') = 'string' AND coalesce(json_typeof(model_id), 'string') = 'string'
      AND coalesce(json_typeof(worker_id), 'string') = 'string'
      AND schema::text ~ '^[1-9]\d{0,8}$' AND type::text ~ '^"[A-Z][A-Za-z]{0,63}"$'
      AND coalesce(version::text, '0') ~ '^(0|[1-9]\d{0,18})$' AS is_event
    FROM unnest(bodies, hashes) WITH ORDINALITY AS rows (body, hash, number),
      json_to_record(replace(body, '\u0000', '\u0001')::json) AS parsed (
        actor json, data json, id json, job_id json, model_id json, position json, recorded_at json, schema json,
        type json, version json, worker_id json
      )
  ), linked AS (
    SELECT
      number, body, hash, said, at, data, type, is_event,
      lag(hash, 1, after_hash) OVER (ORDER BY number) AS previous,
      lag(at, 1, tip.recorded_at) OVER (ORDER BY number) AS before
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
      OR is_event IS DISTINCT FROM true
      OR at COLLATE "C" < before COLLATE "C"
      OR at <> before AND to_char(at::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') <> at
      OR type::text = '"NodeJoined"' AND data ->> 'after' <> encode(previous, 'hex')
    ),
    (array_agg(hash) FILTER (WHERE number = cardinality(bodies)))[1],
    max(at COLLATE "C")
  INTO wrong, last_hash, last_at
  FROM linked;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION 'event % does not follow, or is no event: hash, position, time or members', after_position + wrong;
  END IF;
  IF last_at COLLATE "C" > tip.recorded_at COLLATE "C" AND last_at::timestamptz > clock_timestamp() + interval '1 s' THEN
    RAISE EXCEPTION 'the clock of the server is ahead of the database''s by more than a second: %', last_at;
  END IF;
  UPDATE head SET position = after_position + cardinality(bodies), hash = last_hash, recorded_at = last_at;
  PERFORM pg_notify('loadledger', '');
  RETURN 'appended';
END
$$;

-- Begin and end the epochs that events about nodes begin and end, or refuse the events.
CREATE FUNCTION check_epochs(of_nodes json[], node text, node_epoch bigint, new_lease_s float8) RETURNS void
LANGUAGE plpgsql SET search_path = loadledger, pg_temp AS $$
DECLARE
  event json;
  named text;
  named_epoch bigint;
  own_epoch bigint;
BEGIN
  IF of_nodes IS NOT NULL THEN
    FOREACH event IN ARRAY of_nodes LOOP
      named := event -> 'data' ->> 'node_id';
      named_epoch := event -> 'data' ->> 'epoch';
      IF event ->> 'type' = 'NodeJoined' THEN
        INSERT INTO nodes AS before (node_id, epoch, instance, lease_s, renewed_at, steady_since)
        VALUES (
          named, named_epoch, coalesce(event -> 'data' ->> 'instance', ''), new_lease_s, clock_timestamp(),
          clock_timestamp()
        )
        ON CONFLICT (node_id) DO UPDATE SET
          epoch = excluded.epoch, instance = excluded.instance, ended = false, lease_s = excluded.lease_s,
          renewed_at = excluded.renewed_at, steady_since = excluded.steady_since
        WHERE before.epoch < excluded.epoch;
        IF NOT FOUND THEN
          RAISE EXCEPTION 'epoch % of node % is over', named_epoch, named USING ERRCODE = 'LL001';
        END IF;
        IF named = node THEN
          own_epoch := named_epoch;
        END IF;
      ELSIF event ->> 'type' = 'NodeLost' THEN
        -- The one that judges has renewed without a gap for a lease: an outage of this database makes no node lost.
        PERFORM FROM nodes WHERE node_id = node AND epoch = node_epoch AND NOT ended
          AND steady_since + nodes.lease_s * interval '1 second' <= clock_timestamp()
          AND renewed_at + nodes.lease_s * interval '1 second' > clock_timestamp();
        IF NOT FOUND THEN
          RAISE EXCEPTION 'this node may not say that % is lost', named USING ERRCODE = 'LL002';
        END IF;
        UPDATE nodes SET ended = true WHERE node_id = named AND epoch = named_epoch AND NOT ended
          AND renewed_at + nodes.lease_s * interval '1 second' < clock_timestamp();
        IF NOT FOUND THEN
          RAISE EXCEPTION 'node % is not late', named USING ERRCODE = 'LL002';
        END IF;
      END IF;
    END LOOP;
  END IF;
  IF node IS NOT NULL THEN
    PERFORM FROM nodes WHERE node_id = node AND epoch = coalesce(own_epoch, node_epoch) AND NOT ended FOR SHARE;
    IF NOT FOUND THEN
      RAISE EXCEPTION 'epoch % of node % is over', node_epoch, node USING ERRCODE = 'LL001';
    END IF;
  END IF;
  IF of_nodes IS NOT NULL THEN
    FOREACH event IN ARRAY of_nodes LOOP
      IF event ->> 'type' = 'NodeLeft' THEN
        UPDATE nodes SET ended = true
        WHERE node_id = event -> 'data' ->> 'node_id' AND epoch = (event -> 'data' ->> 'epoch')::bigint;
      END IF;
    END LOOP;
  END IF;
END
$$;

-- Renew a node's lease; false if its epoch is over.
CREATE FUNCTION renew(node text, node_epoch bigint, new_lease_s float8, new_hints text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = loadledger, pg_temp AS $$
BEGIN
  UPDATE nodes SET
    steady_since = CASE
      WHEN renewed_at + lease_s * interval '1 second' < clock_timestamp() THEN clock_timestamp() ELSE steady_since
    END,
    renewed_at = clock_timestamp(), lease_s = new_lease_s, hints = new_hints
  WHERE node_id = node AND epoch = node_epoch AND NOT ended;
  RETURN FOUND;
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
