-- Who joined a job is looked up in the log itself, however many joined it.
CREATE INDEX events_by_join ON events (job_id, actor)
WHERE type IN ('LoadJoined', 'UnloadJoined', 'CancelRequested');
