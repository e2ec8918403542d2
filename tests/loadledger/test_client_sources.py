"""Both clients: a version by its name, which is downloaded here, and a statement about files of one's own."""

from pathlib import Path

import pytest
from support.clients import KINDS, connected
from support.servers import Server
from support.sources import MODEL, SHA256, environment_of, standing_site

from loadledger import SourceProblem


@pytest.mark.parametrize("kind", KINDS)
def test_version_is_added_with_where_it_comes_from(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = tmp_path / "own.onnx", list[tuple[int, int]]()
    own.write_bytes(MODEL)
    with standing_site() as site, connected(kind, server.url, server.api.token("admin")) as client:
        for name, value in environment_of(site, tmp_path).items():
            monkeypatch.setenv(name, value)
        url, m = site.url("/files/m.onnx"), f"sourced-{kind}"
        added = client.add(
            m, source=url, digest=f"sha256:{SHA256}", on_progress=lambda *counts: told.append(counts)
        )
        assert (added.version, added.files[0].sha256) == (1, SHA256)
        assert told[-1] == (len(MODEL), len(MODEL))
        assert client.add(m, own, source="mlflow://runs/42/model").version == 2
        assert client.add(m, own).version == 3
        found = [(each.version, each.source, each.resolved) for each in client.model(m).sources]
        assert found == [
            (1, url, f"{url}#sha256={SHA256}"),
            (2, "mlflow://runs/42/model", "mlflow://runs/42/model"),
        ]
        with pytest.raises(SourceProblem) as problem:
            client.add(m, source=site.url("/none.onnx"))
        assert problem.value.code == "source_not_found"
        with pytest.raises(ValueError, match="give a path, or a source"):
            client.add(m)
        with pytest.raises(ValueError, match="whose signature comes along"):
            client.add(m, source=url, signature=own)
