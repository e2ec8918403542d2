"""TLS: the server's certificate, reloaded when its file changes.

The files are checked at a handshake, at most once a second. An unusable renewal, such as a certificate
without its new key, is not loaded.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, cast

from cryptography import x509

from server.auth.modes import find_risk
from server.config import ConfigError

_log = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0
"""Checking two files each second costs nothing, and no renewal is more urgent."""


class TlsProblem(ConfigError):
    """The certificate or its key cannot be used; the text says why and what to do."""


def load_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Return the context of a server's handshakes, with TLS 1.2 or newer.

    Both files are PEM: the server's certificate, then its intermediates; and the key, not encrypted.

    Raises:
        TlsProblem: the files cannot be used.
    """
    _read_certificate(cert)
    _check_key_file(key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])

    def refuse_password() -> NoReturn:  # without it OpenSSL would ask the terminal, and wait
        raise TlsProblem(
            f"{key} is encrypted, and a server cannot ask for its password;"
            f" write a key without one by `openssl pkey -in {key} -out …`, and protect it by its mode"
        )

    try:
        context.load_cert_chain(cert, key, password=refuse_password)
    except ssl.SSLError as error:
        raise TlsProblem(_reason(error, cert, key)) from None
    except OSError as error:
        raise TlsProblem(f"{cert} or {key} cannot be read: {error.strerror}") from None
    return context


class Certificate:
    """The current certificate and key; handshakes of `context` use the latest usable content of the files.

    Raises:
        TlsProblem: the files cannot be used.
    """

    def __init__(self, cert: Path, key: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._cert = cert
        self._key = key
        self._clock = clock
        self._checked_s = clock()
        # Before the files are read, so that the next check notices a concurrent change.
        self._versions = _version(cert), _version(key)
        self._current = self.context = self._load()
        self.context.sni_callback = self._on_handshake

    def _on_handshake(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Set the certificate of a handshake; OpenSSL calls this also if the client names no server."""
        if self._clock() - self._checked_s >= RELOAD_INTERVAL_S:
            self._checked_s = self._clock()
            self._reload_if_changed()
        if self._current is not connection.context:
            connection.context = self._current

    def _reload_if_changed(self) -> None:
        versions = _version(self._cert), _version(self._key)
        if versions == self._versions:
            return
        self._versions = versions
        try:
            self._current = self._load()
            _log.info("the TLS certificate %s was renewed", self._cert)
        except TlsProblem as error:  # probably half renewed: the next change is read again
            _log.warning("the TLS certificate cannot be renewed yet, the one in use stays: %s", error)

    def _load(self) -> ssl.SSLContext:
        context = load_context(self._cert, self._key)
        ends = _read_certificate(self._cert).not_valid_after_utc
        if ends <= datetime.now(UTC):
            _log.warning("the TLS certificate %s has expired on %s: clients will refuse it", self._cert, ends)
        return context


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return an identity that changes with the file's content and rights, or None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


def _read_certificate(path: Path) -> x509.Certificate:
    _stat_file(path)
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())[0]
    except (OSError, ValueError) as error:
        raise TlsProblem(
            f"{path} has no readable certificate ({error});"
            " it must be PEM, with the server's own certificate first"
        ) from None


def _check_key_file(path: Path) -> None:
    """Refuse a key that another user could read or change; a group may read it (`server.auth.modes`)."""
    _stat_file(path)
    if (risk := find_risk(path, is_private=True)) is not None:
        raise TlsProblem(risk)


def _stat_file(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise TlsProblem(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO would wait
        raise TlsProblem(f"{path} is not a file")
    return status


def _reason(error: ssl.SSLError, cert: Path, key: Path) -> str:
    match cast("str | None", error.reason):  # None if OpenSSL names no reason
        case "KEY_VALUES_MISMATCH" | "KEY_TYPE_MISMATCH" | "NO_CERTIFICATE_ASSIGNED":
            return f"{key} is not the key of the first certificate in {cert}; name a matching pair"
        case None:
            return f"{key} has no readable private key; it must be PEM"
        case reason:
            return f"{cert} with {key} is refused: {reason.lower().replace('_', ' ')}"
