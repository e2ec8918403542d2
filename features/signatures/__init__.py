"""Signatures: the files of a version are signed, and the operator's rules say by whom.

`bundles` parses a signature bundle of OpenSSF Model Signing, and `verification` checks one against a rule
(`rules`), the hashes that the store computed, and a time.
"""
