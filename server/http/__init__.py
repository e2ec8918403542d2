"""HTTP below the application: connections, bodies, responses.

A connection is a `connection.GuardedConnection` around aiohttp's protocol. Its requests pass the wrappers of
`server.routing.wrap_handler`, then the fast path of inferences or aiohttp's router and middlewares.

- `connection`: slow-client protection, the connection limit and its reserve; listens
- `tls`: certificates, reloaded when they change
- `bodies`: reads bodies, within the budget of memory for them
- `validation`: checks requests against the schemas of their route
- `compression`: content codings of bodies, both ways
- `responses`: fast responses in one piece; responses to malformed HTTP
"""
