"""The management API under /api/v1, health, and the pages for people.

- `models`, `versions`, `loads`, `jobs`, `tokens`: the resources; `Prefer: wait=N`, idempotency keys: `jobs`
- `overview`, `resources`, `samples`, `timeline`: what the console shows: first page, memory, charts, drawing
- `events`, `stream`: pages of the log, its signed head, and streams that follow it
- `timetravel`: the same lists at a moment of the past (`?at=`)
- `health`: liveness, readiness, the OpenAPI document; `pages`: the console at `/`, documentation at `/docs`
- `schemas`: schemas that several resources share; each resource has its own beside its handlers

Handlers parse, make one call and serialise. A command that becomes a job goes through
`jobs.answer_with_job`; `events` alone decides whether to accept it.
"""
