"""The search for what a test run leaves: it finds a process of each kind, a file in memory, and a socket."""

import socket
import tempfile
from pathlib import Path

import pytest
from support import leaks, models
from support.servers import serving

from runtime.memory import list_descendants
from server.config import Config


async def test_all_processes_of_a_server_are_found(config: Config) -> None:
    models.save(models.add(), config.repository, "m")
    another = f"{leaks.RUN}-another"
    async with serving(config, environment={leaks.MARK: another}) as server:
        await server.api.load("m")
        found = [pid for pid, _ in leaks.find_processes(another)]
        assert {server.pid, *list_descendants(server.pid)} <= {*found}
        assert len(found) >= 3
        assert await server.stop() == 0
    assert list(leaks.find_processes(another)) == []


def test_file_in_memory_is_found_once_no_process_has_it() -> None:
    if leaks.fast_folder() is None:
        pytest.skip("this machine has no writable /dev/shm")
    with tempfile.NamedTemporaryFile(dir=leaks.MEMORY) as file:
        path = Path(file.name)
        assert path not in leaks.find_memory_files()
        file.file.close()
        assert path in leaks.find_memory_files()
    assert path not in leaks.find_memory_files()


def test_socket_is_found_once_no_process_listens_to_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            assert path not in leaks.find_sockets()
        assert path in leaks.find_sockets()
