"""The command `loadledger`: one module per group of commands, thin over the client or the ledger's files.

`main` finds a command by name, alias or section and imports only its module: `loadledger --help` and commands
that talk to a server must start fast, and a test lists their imports.

- `models`, `jobs`, `events`, `infer`, `top`: commands to a server; `options` gives the client
- `ledger`, `keys`: commands on files; `serve`: commands that run a server, then `startup`; `demo`
- `output`: tables, values with units, notes on stderr, exit codes; `times`: times and durations
- `inputs`, `arrays`: what `infer` sends and shows; `snippets`: the first commands to send a model

To add a command, write it in the module of its subject, or in its feature, name it in `SECTIONS` of `main`,
and give it two lines in examples.txt; then run `python -m tools.generate`, which writes docs/cli.md.
"""
