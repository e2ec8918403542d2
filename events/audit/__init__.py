"""Proof of a ledger: verification, archives, exports, backups and signed heads.

`verify` proves the log with its hash chain and a fold; `audit` adds the file, the schema, archives, exports
and an expected head. `export` writes lines that prove themselves, `exportreader` verifies them again, and
`archive` moves the oldest events to such a file. Reads here hold one snapshot for long, on purpose.

A file that cannot be read or written raises OSError. Nothing here knows SQL: ledgers are read through
functions of `events.sqlite`. `CheckedFold` and `export_rows` take the rows of any log.

- `verify`: the chain, the events, the base, and the stored projections against the fold
- `policy`: loads against the rules for signatures and approvals; add a new rule about loads here
- `audit`: one result for the command `verify`; add a new check of the whole file here
- `export`, `exportreader`, `signing`: formats, their verification, the signed head
- `archive`, `replay`: moving events away; the state at any moment, from archives, too
- `backup`: a copy beside a running server
"""
