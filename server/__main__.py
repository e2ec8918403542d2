"""`python -m server` is the command `loadledger`."""

from server.cli import main

main()
