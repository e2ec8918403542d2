"""The management API under /api/v1, health, and the pages for people.

- `models.py`, `loads.py`, `jobs.py`: load, unload, cancel; lists; `Prefer: wait=N`; idempotency keys
- `schemas.py`: what several resources share; each resource has its own schemas beside its handlers
- `timetravel.py`: the same lists at a moment of the past (`?at=`)
- `events.py`, `stream.py`: pages of the log, its signed head, and streams that follow it
- `resources.py`: use of the memory budget
- `nodes.py`: the servers that share the ledger, and draining one
- `samples.py`, `model_stderr.py`: samples for charts; the last lines of a model's workers
- `health.py`: liveness, readiness, the OpenAPI document
- `pages.py`: the console at `/` and the documentation at `/docs`

Handlers parse, make one call and serialise. What becomes a job goes through `jobs.answer_with_job`;
`events.accept` alone decides whether to accept it.
"""
