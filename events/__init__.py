"""The ledger: event types, the hash-chained log in SQLite, projections, tail and verification.

This package knows no HTTP and no ONNX, and imports neither `runtime` nor `server`.
"""
