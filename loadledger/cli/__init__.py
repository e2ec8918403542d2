"""The command `loadledger`: one module per group of commands, thin over the client or the ledger's files.

main.py finds a command by name, alias or section and imports only its module. Commands that talk to a
server (models, jobs, nodes, events, infer, top) get a client from options.py, which reads options, variables
and profiles. Commands on files (ledger, keys) and those that run a server (serve) import what they
need inside their functions, from the server's packages and from startup, demo, database, verification and
arrays: `loadledger --help` and the thin commands must start fast, and a test lists what they may import.
output.py has tables, values with units, notes on stderr and exit codes; times.py reads times and durations;
snippets.py has the first commands to send a model.

To add a command, write it in the module of its subject, name it in `SECTIONS` of main.py, and give it two
lines in examples.txt; then run `python -m tools.generate`, which writes docs/cli.md.
"""
