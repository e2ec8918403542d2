"""Answers of the API: one struct for each, which server, client and openapi.yaml share.

A handler of the server builds an answer and hands it to `server.http.answers`; the client decodes the same
class; `server.openapi` describes it. This package imports nothing of the project.

    answer.py        the base: what is always there, what may be missing; descriptions of members
    errors.py        why a job, a model or a request failed
    models.py  versions.py  approvals.py  tensors.py  jobs.py  past.py      models and what happens to them
    events.py  timeline.py  samples.py                                      the ledger, and times
    resources.py  nodes.py  tokens.py  health.py  overview.py               the server
    inference.py                                                            the Open Inference Protocol

To add a member, give it a default, and set it where the server builds the answer. If an answer shows a thing
that the ledger or the runtime keeps as a class of its own, its name is that class's with `Info`: `JobInfo`.
"""
