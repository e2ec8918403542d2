"""Nodes, the servers that share one ledger: their facts, register and commands.

What a node does is in the package `nodes`; its facts are folded wherever a ledger is, by `verify` too.
"""
