"""Objects of cloud stores: S3 and compatible stores, Google Cloud Storage, Azure Blob Storage.

The client is obstore, of the extra `cloud`. It reads credentials and addresses from variables (`AWS_…`,
`GOOGLE_…`, `AZURE_…`). Without credentials, requests are anonymous: no metadata service of a cloud is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, unquote

from loadledger.errors import SourceProblem
from loadledger.sources.downloads import Download, Downloads, OpenFile
from loadledger.sources.names import SourceName
from loadledger.sources.origin import RemoteFile, Resolved, quote_error
from loadledger.uploads import CHUNK_BYTES
from runtime.onnxfile import find_model_file, is_signature_beside, list_model_files

try:
    import obstore
    from obstore import exceptions, store
except ModuleNotFoundError:
    raise SourceProblem(
        "not_installed", "object stores need a package that is not installed: pip install 'loadledger[cloud]'"
    ) from None

MAX_OBJECTS = 10_000  # in a listing: more than a version has
PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
STORES = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE AWS_ROLE_ARN"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"),
    "az": (
        *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        "AZURE_TENANT_ID AZURE_CLIENT_ID AZURE_CLIENT_SECRET",
        "AZURE_TENANT_ID AZURE_CLIENT_ID AZURE_FEDERATED_TOKEN_FILE",
    ),
}
"""Variables, or sets of them, that make metadata services unnecessary; others are not used."""
PROBLEMS = {
    exceptions.PermissionDeniedError: "source_denied",
    exceptions.UnauthenticatedError: "source_denied",
    exceptions.PreconditionError: "source_changed",
    exceptions.InvalidPathError: "source_invalid",
    FileNotFoundError: "source_not_found",
}
LISTING_PROBLEMS = {"401": "source_denied", "403": "source_denied", "404": "source_not_found"}
LISTING_STATUS = re.compile(r"list request: [^\n]* status code: (\d{3})")
"""The status in the text of a listing's error, which has no class for each status."""


class Cloud:
    """An object, or, for a name with a slash at its end, the objects beneath it; see `Origin`."""

    def __init__(self, source: SourceName, digest: str | None) -> None:
        self._source, self._digest = source, digest
        self._key = unquote(source.path)
        self._store = _create_store(source)
        self._objects: dict[str, obstore.ObjectMeta] = {}

    def resolve(self) -> Resolved:
        """Return the model's version or entity tag, and its files; in a folder, it needs its companions."""
        folder, slash, name = self._key.rpartition("/")
        is_folder = not name
        model = None if is_folder else self._find_object(self._key)
        found = self._list(folder + slash, is_needed=is_folder)
        name = name or find_model_file(found) or ""
        if not name:
            shown = ", ".join(list_model_files(found)[:5]) or "none"
            raise SourceProblem(
                "source_invalid",
                f"{self._source.name} takes model.onnx, or one file that ends in .onnx, and has {shown}: name"
                " the object",
            )
        key = folder + slash + name
        model = found[name] = model or self._find_object(key)
        self._objects = {each["path"]: each for each in found.values()}
        needed = {name, *(path for path in found if is_folder and is_signature_beside(path))}
        files = tuple(
            RemoteFile(
                path,
                each["size"],
                self._digest if path == name else None,
                is_needed=path in needed,
                key=each["path"],
            )
            for path, each in found.items()
        )
        return Resolved(f"{self._source.scheme}://{self._source.host}/{quote(key)}{_mark(model)}", files)

    def fetch(self, file: RemoteFile, downloads: Downloads) -> Download:
        """Fetch an object; raise `source_changed` if it is not the resolved one."""
        found = self._objects[file.key]
        options: obstore.GetOptions = {}
        if tag := found["e_tag"]:
            options["if_match"] = tag if tag.endswith('"') else f'"{tag}"'  # Azure lists them without quotes
        if found["version"]:
            options["version"] = found["version"]

        def open_at(offset: int) -> OpenFile:
            if offset:  # an empty object has no range
                options["range"] = {"offset": offset}
            with _translated_errors():
                result = obstore.get(self._store, file.key, options=options)
            return OpenFile(offset, found["size"], _read(result))

        endpoint = sorted(f"{name}={text}" for name, text in os.environ.items() if "ENDPOINT" in name)
        identity = f"{endpoint} {self._source.scheme}://{self._source.host}/{file.key}{_mark(found)}"
        return downloads.receive(identity if tag else None, open_at, size=found["size"], sha256=file.sha256)

    def _find_object(self, key: str) -> obstore.ObjectMeta:
        """Return the description of an object; a folder in its place is called one."""
        try:
            with _translated_errors():
                return obstore.head(self._store, key)
        except SourceProblem as problem:
            if problem.code == "source_not_found" and self._has_objects(f"{key}/"):
                name = self._source.name
                raise SourceProblem(
                    "source_invalid", f"{name} is a folder, whose name ends in a slash: write {name}/"
                ) from None
            raise

    def _has_objects(self, prefix: str) -> bool:
        with suppress(SourceProblem), _translated_errors():
            return any(obstore.list(self._store, prefix, chunk_size=1))
        return False

    def _list(self, prefix: str, *, is_needed: bool) -> dict[str, obstore.ObjectMeta]:
        """Return a folder's objects by their path in it; empty if denied and not needed."""
        try:
            with _translated_errors():
                return self._list_all(prefix)
        except SourceProblem as problem:
            if is_needed or problem.code != "source_denied":
                raise
        return {}

    def _list_all(self, prefix: str) -> dict[str, obstore.ObjectMeta]:
        found: dict[str, obstore.ObjectMeta] = {}
        for page in obstore.list(self._store, prefix or None):
            found |= {each["path"].removeprefix(prefix): each for each in page}
            if len(found) > MAX_OBJECTS:
                raise SourceProblem(
                    "source_invalid",
                    f"the folder has more than {MAX_OBJECTS} objects: give the model its own folder",
                )
        return found


def _mark(found: obstore.ObjectMeta) -> str:
    return f"#versionId={found['version']}" if found["version"] else f"#etag={found['e_tag']}"


def _read(result: obstore.GetResult) -> Generator[bytes, None, None]:
    """Yield a store's bytes, in pieces of about `CHUNK_BYTES`."""
    with _translated_errors():
        for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)


def _create_store(source: SourceName) -> store.ObjectStore:
    """Return the client of a source's bucket."""
    prefix = PREFIXES[source.scheme]
    has_credentials = any(
        all(os.environ.get(name) for name in names.split()) for names in CREDENTIALS[source.scheme]
    )
    options: store.ClientConfig = {
        "allow_http": os.environ.get(f"{prefix}ALLOW_HTTP", "").lower() == "true",
        "read_timeout": timedelta(minutes=1),
        "timeout": timedelta(days=1),  # for a whole large model; obstore's own is 30 s
    }
    try:
        if certificates := os.environ.get("SSL_CERT_FILE"):
            options["root_certificate"] = Path(certificates).read_bytes()
        created: store.ObjectStore = STORES[source.scheme](
            source.host,
            config={} if has_credentials else {"skip_signature": True},
            client_options=options,
            retry_config={"max_retries": 5},
        )
    except (OSError, exceptions.BaseError) as error:
        raise SourceProblem(
            "source_invalid", f"the variables for {source.scheme}:// are not taken: {_shorten(error)}"
        ) from None
    return created


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Raise the `SourceProblem` for an error of obstore."""
    try:
        yield
    except (FileNotFoundError, exceptions.BaseError) as error:
        words, status = _shorten(error), LISTING_STATUS.search(str(error))
        code = LISTING_PROBLEMS.get(status[1]) if status else PROBLEMS.get(type(error))
        if code == "source_denied":
            words += "; credentials come from variables; without any, requests are anonymous"
        raise SourceProblem(code or "source_unreachable", words) from None


def _shorten(error: Exception) -> str:
    """Return the text of an error, without obstore's chain of causes."""
    return quote_error(str(error).partition("\n\nDebug source")[0])
