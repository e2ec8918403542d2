"""Recorded inferences: a line for each, in files whose digests are in the ledger.

- `rules`, `table`: the operator's tables `[[record]]`, and the choice of a share by the request's id
- `lines`: the line of an inference, from what was asked and answered
- `recorder`: on the event loop: takes inferences, queues lines, drops what finds no room
- `files`: in a thread: open files, their ends, those that a dead server left, and how long files are kept
- `app`: the recorder's place in the server: announces closed files, erases old ones
- `reading`, `routes`, `cli`: lists, searches and erases; `verification` compares files with the ledger

An inference's way: `recorder` gets it when its answer is written, and a thread writes its line. When the
file is full, an hour old or the server stops, `RecordsClosed` has its digest. Then the file gets its name.
"""
