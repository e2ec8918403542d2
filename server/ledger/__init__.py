"""The ledger as it is shown: listed, followed, signed and checked."""
