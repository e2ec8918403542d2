"""Who may do what: authentication, authorisation and rate limits.

`gate.Gate.admit` checks each request, in this order: failures of its address (429, unless its token is
remembered), its token (401), the limit of its subject (429), its roles (403). The middleware calls it for
every request except those to public routes, and the fast path for inferences.

- `gate`: tokens, roles, the middleware; denials, counted for the ledger
- `keys`: the private keys in the data directory, and the ledger's; signs tokens, rotates and revokes keys;
  the public keys that verify tokens, ours or an identity provider's
- `modes`: whether another user could change a key, the data directory or the configuration
- `tokens`: a token is signed and recorded; revocations, sign-in links
- `control`: the socket in the data directory, over which commands on this machine manage tokens and nodes
- `subjects`: which subjects a token may have
- `ratelimit`: the windows that count requests, and the header fields that show them
- `proxies`: the client's address behind trusted proxies

The role of a route (`access`) is declared with the route, see `server.routing`. A refusal's status is in
`server.errors`.
"""
