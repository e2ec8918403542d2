"""Why a version cannot be put into the repository, or removed from it."""

from runtime.errors import RuntimeProblem


class BadArchive(RuntimeProblem):
    """The tar is damaged, or has something that a model's folder must not have."""

    code = "bad_archive"


class NotOnnx(RuntimeProblem):
    """The body is no ONNX model."""

    code = "not_onnx"


class DigestMismatch(RuntimeProblem):
    """The body is not the one that its digest is of."""

    code = "digest_mismatch"


class UploadTooLarge(RuntimeProblem):
    """The upload has more bytes than a version may have."""

    code = "body_too_large"

    def __init__(self, max_bytes: int) -> None:
        super().__init__(
            f"a version may have {max_bytes} bytes, and this one has more: put it there yourself"
        )


class InsufficientStorage(RuntimeProblem):
    """The repository's disk has no room for the version."""

    code = "insufficient_storage"


class RepositoryReadOnly(RuntimeProblem):
    """The server does not change this repository."""

    code = "repository_read_only"


class RepositoryNotShared(RuntimeProblem):
    """This node does not know whether the other nodes have the same repository."""

    code = "repository_not_shared"


class VersionExists(RuntimeProblem):
    """The repository has this version, or it is just being added or removed."""

    code = "version_exists"

    def __init__(self, model_id: str, version: int, *, is_changing: bool = False) -> None:
        how = "is just being added or removed" if is_changing else "exists"
        super().__init__(
            f"version {version} of {model_id!r} {how}, and a version is never overwritten: choose another"
            " number"
        )


class VersionNotNew(RuntimeProblem):
    """The request is for a version that is not there yet, and it is there."""

    code = "precondition_failed"


class VersionInUse(RuntimeProblem):
    """A load uses the version."""

    code = "version_in_use"
