"""The command `loadledger`: a module for each kind of subcommand, which imports what it needs when run."""
