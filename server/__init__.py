"""Speak HTTP: routes, authentication, errors, console. Only this package imports the web framework.

The way of a request: `http/connection.py` (limits and timeouts of a connection),
`observability/requestlog.py` (log line), `errors.py` (one form of all errors), `auth/gate.py`,
`http/validation.py`, then a handler of `api/` or `v2/`. `app.py` assembles all of it and opens the resources.

- a new route: a handler in `api/` or `v2/` with the decorator of `routing.py`
- a new error code: a line in `errors.py` and in `tools/errors.py`
- a new setting: a field in `config.py`; `configsources.py` reads it, `check.py` checks the files it names
- how the process runs, its signals and its exit code: `serve.py`
- shared objects of the application: `appkeys.py`; what it asks of other servers: `cluster.py`
- the rules for signatures and approvals: `policy.py`
- the console: `static/`; the description of all routes: `openapi.py`

After a change of routes, settings or errors, run `python -m tools.generate`.
"""
