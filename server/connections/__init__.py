"""Connections: their limits, HTTPS, memory for bodies, and responses written past the framework.

`connection` wraps aiohttp's protocol with limits and listens; `refusals` has the responses to what is no
request; `tls` reloads certificates; `bodies` bounds the memory of request and response bodies, and `direct`
writes the responses of the fast path. Slow request bodies are refused in `server.validation`.
"""
