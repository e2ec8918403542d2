"""`python -m loadledger` is the command `loadledger`."""

from loadledger.cli.main import main

main()
