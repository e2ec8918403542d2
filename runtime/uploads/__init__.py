"""Model versions that callers put into the repository, or remove from it.

The files of a version arrive in a staging folder inside the repository, one after the other; then the version
becomes durable as an event, and visible by one rename. A start of the server finishes changes with an event,
keeps uploads that their callers may go on with, and discards the rest.

- `uploads`: the operations of callers: begin an upload, send a file, commit, discard, remove
- `receive`: one file on its way to the disk: its path, its limits, its digests
- `staging`: the folder, the files of an upload so far, the rename
- `changes`: one addition or removal, in threads with time limits, and its event
- `recovery`: changes and uploads of a server that ended
"""
