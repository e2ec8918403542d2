"""The commands that work on this machine: they run a server, or read the files of one, without HTTP.

`serve` starts the server of `server.serve`, and `startup` says what it found; `demo` is a client of a server
of its own, and `democluster` of three, over the database of `demodatabase`. `raycluster` starts a node on
each machine of a Ray cluster, and `raynode` keeps it running there. `ledger` has the commands that verify,
export, archive and back up a ledger's files, which `localledger` opens.

Importing these modules takes the server's packages with them, so `loadledger.cli.main` imports each on use.
"""
