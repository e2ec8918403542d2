"""The server that the clients of the contract meet."""

import gc
from collections.abc import Iterator

import pytest
from support import models
from support.dialects import ELEMENTS, headers, triton_client
from support.servers import INFORMED, Server, bearer, standing

LOADED = ("subtract", "loop", *(f"identity-{datatype}" for datatype in ELEMENTS))
ARGUMENTS = ("--grpc-port=0", "--inference-timeout-s=3600")
"""An inference that no client stops does not end while these tests run."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the models of `LOADED`; `idle` is not loaded, `corrupt` cannot be."""
    root = tmp_path_factory.mktemp("clients") / "repository"
    for datatype, element in ELEMENTS.items():
        models.save(models.identity(element, [None, None]), root, f"identity-{datatype}")
    models.save(models.subtract(), root, "subtract")
    models.save(models.counting_loop(), root, "loop")
    models.save(models.identity(), root, "idle")
    models.save_bytes(models.CORRUPT, root, "corrupt")
    with (
        standing(root, *ARGUMENTS, environment=INFORMED) as server,
        triton_client(server, "sync") as client,
    ):
        for name in LOADED:
            client.load_model(name, headers=bearer(server, "admin"))
        yield server
    gc.collect()  # the threads of gRPC end with its last object, and other tests fork this process


@pytest.fixture
def admin(server: Server) -> dict[str, str]:
    return headers(server, "admin")
