"""The management API under /api/v1, health, and the pages for people.

- `models.py`, `loads.py`, `jobs.py`: lists; load, unload, cancel; `Prefer: wait=N`; idempotency keys;
  the last lines that a model's workers printed
- `schemas.py`: what several resources share; each resource has its own schemas beside its handlers
- `timetravel.py`: the same lists at a moment of the past (`?at=`)
- `events.py`, `stream.py`: pages of the log, its signed head, and streams that follow it
- `resources.py`: use of the memory budget
- `samples.py`: samples for charts
- `health.py`: liveness, readiness, the OpenAPI document
- `pages.py`: the console at `/` and the documentation at `/docs`

Handlers parse, make one call and serialise. What becomes a job goes through `jobs.answer_with_job`;
`events.accept` alone decides whether to accept it.
"""
