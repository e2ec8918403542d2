"""The operator's policy for loads: which signatures and approvals a model's versions need. Pure.

`rules` has the rules of a policy, those of one model, and their digests. `bundles` parses a signature bundle
of OpenSSF Model Signing, and `signatures` checks one against a rule, the hashes that the store computed, and
a time.

The server reads a policy at its start (`server.policy`) and records it (`PolicyInForce`); a load's coroutine
checks what it is about to load (`runtime.consumer.checks`); `events.audit.policy` checks the log afterwards.
"""
