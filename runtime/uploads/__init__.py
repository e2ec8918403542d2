"""Model versions that callers put into the repository, or remove from it.

The files of a version arrive in a staging folder inside the repository, one after the other; then the version
becomes durable as an event, and is visible by one rename. A start of the server finishes what has its event,
keeps the uploads that their callers may go on with, and discards the rest.

- `receive`: one file on its way to the disk: its path, its limits, its digests; and what is no model
- `staging`: the folder, the files that an upload has so far, the rename, and what may be changed at all
- `changes`: the way of one addition or removal, in threads with time limits, and its event
- `recovery`: what becomes of a change whose server ended, and of an upload that nobody goes on with
- `uploads`: what callers do: begin an upload, send a file, commit, discard, remove
"""
