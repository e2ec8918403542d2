"""Objects of cloud stores: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage.

The client is obstore, of the extra `cloud`, used from threads: its coroutines sometimes abort the process at
its end (0.12). It reads credentials and addresses from this process's environment, into which those of the
order go. A metadata service gives out the machine's own credentials, so it is asked only if the operator
allows it; without credentials, requests are anonymous.
"""

from __future__ import annotations

import os
import re
from asyncio import to_thread
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, unquote

from runtime.errors import RuntimeProblem
from runtime.fetch.messages import PIECE_BYTES, Order, RemoteFile, Resolved
from runtime.fetch.origin import (
    Download,
    SourceChanged,
    SourceDenied,
    SourceInvalid,
    SourceNotFound,
    SourceTimeout,
    SourceUnreachable,
)
from runtime.fetch.sources import VARIABLE_PREFIXES, SourceName, parse_allowed
from runtime.onnxfile import find_model_file, is_signature_beside, list_model_files

try:
    import obstore
    from obstore import exceptions, store
except ModuleNotFoundError:
    raise RuntimeProblem(
        "sources in clouds need a package that is not installed: install loadledger[cloud]",
        code="not_supported",
    ) from None

MAX_OBJECTS = 10_000  # of a listing: more than a version has
MAX_MESSAGE_CHARACTERS = 400  # of an error of a store, which may quote its whole answer
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
"""Variables, or several together, with which a client asks no metadata service; others are not used."""
PROBLEMS = {
    exceptions.PermissionDeniedError: SourceDenied,
    exceptions.UnauthenticatedError: SourceDenied,
    exceptions.PreconditionError: SourceChanged,
    exceptions.InvalidPathError: SourceInvalid,
    FileNotFoundError: SourceNotFound,
}
LISTING_PROBLEMS = {"401": SourceDenied, "403": SourceDenied, "404": SourceNotFound}
LISTING_STATUS = re.compile(r"list request: [^\n]* status code: (\d{3})")
"""In the text of an error of a listing, which has no class for each status."""


class Cloud:
    """An object, or with a slash at its name's end the objects beneath it."""

    def __init__(self, source: SourceName, order: Order) -> None:
        self._source, self._digest = source, order.digest
        self._key = unquote(source.path)
        self._store = create_store(source, order)
        self._objects: list[obstore.ObjectMeta] = []
        self.client: AbstractAsyncContextManager[object] = nullcontext()

    async def resolve(self) -> Resolved:
        """Return the model's version or entity tag, and its files; in a folder, it needs its companions."""
        folder, slash, name = self._key.rpartition("/")
        is_folder = not name
        found = await to_thread(self._list, folder + slash, is_needed=is_folder)
        name = name or find_model_file(found) or ""
        if not name:
            shown = ", ".join(list_model_files(found)[:5]) or "none"
            raise SourceInvalid(
                f"{self._source.name} takes model.onnx, or one file that ends in .onnx, and has {shown}: name"
                " the object"
            )
        key = folder + slash + name
        with translated_errors():
            model = found[name] = await to_thread(obstore.head, self._store, key)
        self._objects = list(found.values())
        needed = {name, *(path for path in found if is_folder and is_signature_beside(path))}
        files = tuple(
            RemoteFile(path, each["size"], self._digest if path == name else None, is_needed=path in needed)
            for path, each in found.items()
        )
        mark = f"?versionId={model['version']}" if model["version"] else f"#etag={model['e_tag']}"
        return Resolved(f"{self._source.scheme}://{self._source.host}/{quote(key)}{mark}", files)

    @asynccontextmanager
    async def open(self, index: int, offset: int) -> AsyncIterator[Download]:
        """Read an object from an offset on; `source_changed` if it is not the one that was resolved."""
        found = self._objects[index]
        options: obstore.GetOptions = {}
        if tag := found["e_tag"]:
            options["if_match"] = tag if tag.endswith('"') else f'"{tag}"'  # Azure lists them without quotes
        if found["version"]:
            options["version"] = found["version"]
        if offset:  # an empty object has no range
            options["range"] = {"offset": offset}
        with translated_errors():
            result = await to_thread(obstore.get, self._store, found["path"], options=options)
        pieces = read_pieces(result.stream(min_chunk_size=PIECE_BYTES))
        yield Download(offset, found["size"], pieces)

    def _list(self, prefix: str, *, is_needed: bool) -> dict[str, obstore.ObjectMeta]:
        """Return the objects of a folder, by their path in it; none if that is denied and not needed."""
        found: dict[str, obstore.ObjectMeta] = {}
        try:
            with translated_errors():
                for page in obstore.list(self._store, prefix or None):
                    found |= {each["path"].removeprefix(prefix): each for each in page}
                    if len(found) > MAX_OBJECTS:
                        raise SourceInvalid(
                            f"the folder has more than {MAX_OBJECTS} objects: give the model its own folder"
                        )
        except SourceDenied:
            if is_needed:
                raise
        return found


async def read_pieces(stream: obstore.BytesStream) -> AsyncIterator[bytes]:
    """Yield what a store sends, in pieces of at most `PIECE_BYTES`."""
    with translated_errors():
        while (chunk := await to_thread(next, stream, None)) is not None:
            view = memoryview(chunk)
            for start in range(0, len(view), PIECE_BYTES):
                yield bytes(view[start : start + PIECE_BYTES])


def create_store(source: SourceName, order: Order) -> store.ObjectStore:
    """Return the client of a source's bucket, with the order's variables in this process's environment."""
    prefix = VARIABLE_PREFIXES[source.scheme]
    given = {name: value for name, value in order.environment.items() if name.startswith(prefix)}
    has_credentials = any(given.keys() >= {*names.split()} for names in CREDENTIALS[source.scheme])
    has_metadata = parse_allowed(order.allowed).has_metadata
    if not has_metadata:
        given.pop("AZURE_CREDENTIAL_TYPE", None)  # it may choose the metadata service in spite of others
    os.environ.update(given)
    options: store.ClientConfig = {
        "allow_http": given.get(f"{prefix}ALLOW_HTTP", "").lower() == "true",
        "read_timeout": timedelta(minutes=1),
        "timeout": timedelta(days=1),  # of a whole large model; obstore's own is 30 s
    }
    try:
        if certificates := order.environment.get("SSL_CERT_FILE"):
            options["root_certificate"] = Path(certificates).read_bytes()
        created: store.ObjectStore = STORES[source.scheme](
            source.host,
            config={} if has_credentials or has_metadata else {"skip_signature": True},
            client_options=options,
            retry_config={"max_retries": 5},
        )
    except (OSError, exceptions.BaseError) as error:
        raise SourceInvalid(f"the variables for {source.scheme}:// are not taken: {shorten(error)}") from None
    return created


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise the `SourceProblem` that an error of obstore stands for."""
    try:
        yield
    except (FileNotFoundError, exceptions.BaseError) as error:
        words, status = shorten(error), LISTING_STATUS.search(str(error))
        problem = LISTING_PROBLEMS.get(status[1]) if status else PROBLEMS.get(type(error))
        problem = problem or (SourceTimeout if "timed out" in words else SourceUnreachable)
        if problem is SourceDenied:
            words += "; credentials come from the server's environment; without any, requests are anonymous"
        raise problem(words) from None


def shorten(error: Exception) -> str:
    """Return the words of an error, without the queries of addresses, which may have a signature."""
    text = " ".join(str(error).partition("\n\nDebug source")[0].split())
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", ascii(text)[1:-1])[:MAX_MESSAGE_CHARACTERS]
