"""Approvals: persons approve the bytes that models are loaded from, where the operator's rules ask for it."""
