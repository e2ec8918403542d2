"""The optimised model cache: cached models that load faster than the repository's files.

The way of a cached model: after a bare load, `preparer.Preparer.offer` takes the version as a candidate; when
the scheduler finds spare time and memory, a worker writes an optimised form into a draft; `trial` compares it
with the bare model in fresh processes; `store.ModelCache` keeps it under its `key`, in the folder of
`runtime.store`. The next load of the same bytes asks `Preparer.find_form` and passes it to its worker.

To change: what a cached model depends on: `key`. What is recorded of a key: `manifest`. Entries, eviction and
disk space: `store`. When a form is good enough: `trial`. Candidates, attempts, counts: `preparer`.

In the API, commands, events and metrics a cached model is called `prepared`, and its kind its `form`.
"""
