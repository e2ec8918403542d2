"""Proof of a ledger: verification, exports, backups and signed heads.

`verify` proves the log with its hash chain and a fold; `audit` adds the file, the schema, exports and an
expected head. `export` writes lines that prove themselves, and `exportreader` verifies them again. Reads here
hold one snapshot for long, on purpose.

A file that cannot be read or written raises OSError. Nothing here knows SQL: ledgers are read through
functions of `events.sqlite`. `CheckedFold` takes the rows of any log.

- `verify`: the chain, the events, and the stored projections against the fold
- `features.audit`: loads against the operator's rules; add a new rule about loads there
- `audit`: one result for the command `verify`; add a new check of the whole file here
- `export`, `exportreader`, `signing`: formats, their verification, the signed head
- `replay`: the state at any moment
- `backup`: a copy beside a running server
"""
