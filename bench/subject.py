"""A network that one server has prepared and another loads bare, to be compared."""

import time
from dataclasses import dataclass
from pathlib import Path

from bench import models
from bench.driver import Server
from bench.networks import Network
from runtime.cache.key import Entry
from runtime.cache.store import ModelCache

# Three pairs of processes for each form, at low priority: half a minute, where nothing else runs.
PREPARING_LIMIT_S = 900.0
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Subject:
    """A network that is prepared at one server, and not at the other.

    Args:
        network: Which.
        path: Its file, at the server that prepares.
        server: The server that prepares.
        plain: The server that does not.
        entry: What preparing came to.
    """

    network: Network
    path: Path
    server: Server
    plain: Server
    entry: Entry

    @property
    def bytes(self) -> int:
        """What the model's files take."""
        return self.path.stat().st_size

    @property
    def form(self) -> str:
        """What later loads use."""
        return self.entry.form or "bare"

    @property
    def label(self) -> str:
        """What the table calls it."""
        return f"{self.bytes / 1e6:.0f} MB {self.network.what}"


def prepared(network: Network, server: Server, plain: Server, store: ModelCache) -> Subject:
    """Put a network into both repositories, and wait until it is prepared; nothing is loaded then."""
    content = network.build()
    path = models.write(server.repository, network.name, content)
    models.write(plain.repository, network.name, content)
    server.load(network.name)
    entry = tried(store, network.name)
    server.unload(network.name)
    return Subject(network, path, server, plain, entry)


def tried(store: ModelCache, model_id: str) -> Entry:
    """Wait for what `loadledger prepared list` shows of a model that was loaded.

    Not before is the server done with it: its workers that prepare would be measured with the others.
    """
    until = time.monotonic() + PREPARING_LIMIT_S
    while time.monotonic() < until:
        found = next((entry for entry in store.entries() if entry.model_id == model_id), None)
        if found is not None:
            return found
        time.sleep(LOOK_S)
    raise SystemExit(
        f"{model_id} is not prepared after {PREPARING_LIMIT_S:.0f} s: preparing waits for spare time"
        " and memory, and this machine may have none"
    )
