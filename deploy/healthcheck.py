# ruff: noqa: INP001 - it is copied into the image by itself
"""The image's health check: ends with 0 if the server in this container says that it lives.

It asks the address of LOADLEDGER_HOST, and the port of LOADLEDGER_PORT or the one given as argument, in HTTPS
if HTTP is not spoken there. The certificate is not looked at: nobody else listens on an address of the
container itself.

A server that has as many connections as it may lives: it says so, and who opens many must not have it ended.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

FULL = b'"too_many_connections"'
"""The code in the answer of a server that has too many connections."""

LIMIT_S = 2.0
"""For each of the two; the image's HEALTHCHECK gives more than both."""


def address(host: str) -> str:
    """Return where a server that listens there is asked, as in a URL; on every address means on our own."""
    asked = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    return f"[{asked}]" if ":" in asked else asked


def trouble(url: str) -> str | None:
    """Ask, past any proxy that the environment names; return what is wrong, None if the server lives."""
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
    """Return the exit code, and say what is wrong, which `docker inspect` shows."""
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
