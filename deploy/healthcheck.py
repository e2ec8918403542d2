# ruff: noqa: INP001 - a single file, copied into the image
"""The image's health check: exits with 0 if the server in this container is alive.

It requests /health/live from the address LOADLEDGER_HOST and the port LOADLEDGER_PORT, or the port given as
argument; over HTTP, then over HTTPS. It does not verify the certificate: no other program listens on an
address of the container.

A server that refuses a connection because too many are open is alive: opening many must not restart it.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

FULL = b'"too_many_connections"'
"""The error code of a server at its connection limit."""

LIMIT_S = 2.0
"""Timeout of each of the two requests; the image's HEALTHCHECK allows more than both."""


def address(host: str) -> str:
    """Return the address, as in a URL, of a server that binds to `host`; loopback if to all addresses."""
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    return f"[{asked}]" if ":" in asked else asked


def trouble(url: str) -> str | None:
    """Request `url` without the environment's proxies; return the problem, or None if the server is alive."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    handlers = (urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=LIMIT_S):
            return None
    except urllib.error.HTTPError as error:
        return None if FULL in error.read(4096) else f"{url}: {error!r}"
    except Exception as error:  # noqa: BLE001 - refused, too late, or no HTTP
        return f"{url}: {error!r}"


def main() -> int:
    """Return the exit code; print problems to stderr, which `docker inspect` shows."""
    port = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LOADLEDGER_PORT", "8080")
    host = address(os.environ.get("LOADLEDGER_HOST", "127.0.0.1"))
    found = []
    for scheme in ("http", "https"):
        wrong = trouble(f"{scheme}://{host}:{port}/health/live")
        if wrong is None:
            return 0
        found.append(wrong)
    print("\n".join(found), file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
