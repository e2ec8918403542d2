"""Speaks HTTP: routes, authentication, errors, console.

Beside this package, only modules `routes`, `app` and `setup` of features, and `nodes`, import aiohttp.

The way of a request: `http/connection.py` (limits and timeouts), `observability/requestlog.py` (log line),
`errors.py` (one form of all errors), `auth/gate.py`, `http/validation.py`, then a handler of `api/` or `v2/`.
`app.py` assembles all of it and opens the resources.

To change:

- a route: a handler in `api/` or `v2/` with the decorator of `routing.py`
- an error code: a line in `errors.py` and in `tools/errors.py`
- a setting: a field in `config.py`; `configsources.py` reads it, `check.py` checks the files that it names
- the process, its signals and its exit code: `serve.py`
- shared objects of the application: `appkeys.py`; other servers: `cluster.py`
- the console: `static/`; the OpenAPI document: `openapi/`

After a change of routes, settings or errors, run `python -m tools.generate`.
"""
