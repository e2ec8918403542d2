"""The ledger's events are pushed to receivers, in order, each by a POST until it is acknowledged (webhooks).

- `table`: the operator's tables `[[notify]]`
- `delivery`: headers and body of a delivery, and their signature; pure
- `progress`: what a receiver has acknowledged, in a file for each
- `app`: a coroutine for each receiver, metrics, and the notice about one that takes nothing

Headers and signature are those of Standard Webhooks 1.0, the body is a CloudEvent 1.0 as an export has it
(`events.audit.export`). Of several nodes one sends to a receiver (`nodes.duties`).
"""
