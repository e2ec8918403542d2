"""Why a connection failed, in the system's words: they say less than a library's, and mean more."""

from __future__ import annotations

import os
import socket
import ssl


def reason(error: BaseException) -> str:
    """Return why, for people, without names of classes or addresses of theirs."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS fails: {(error.reason or 'no reason given').replace('_', ' ').lower()}"
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return "the server closed it"
