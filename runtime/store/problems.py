"""Why a version cannot be taken into the store, or read from it."""

from runtime.errors import RuntimeProblem


class StoreUnavailable(RuntimeProblem):
    """The store cannot be used at the moment; the message has the system's reason."""

    code = "store_unavailable"


class StoreFull(RuntimeProblem):
    """The version does not fit into the store beside the versions that are needed."""

    code = "store_full"

    def __init__(self, needed_bytes: int, kept_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"the version takes {needed_bytes} bytes, and the store may take {limit_bytes}, of which"
            f" {kept_bytes} are needed by other models: raise --store-size, or unload some"
        )
        self.needed_bytes = needed_bytes
        self.kept_bytes = kept_bytes
        self.limit_bytes = limit_bytes


class DiskFull(RuntimeProblem):
    """The store's disk has no room for the version."""

    code = "disk_full"

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        missing = max(1, needed_bytes - free_bytes)
        super().__init__(
            f"the version takes {needed_bytes} bytes on the disk of the store, and {max(0, free_bytes)} can"
            f" be spared there: {missing} bytes are missing; free as many, or move the data directory"
            if needed_bytes
            else "the disk of the store is full: free some space, or move the data directory"
        )
        self.needed_bytes = needed_bytes
        self.missing_bytes = missing


class RepositoryUnreadable(RuntimeProblem):
    """The repository cannot be read at the moment; the message has the system's reason."""

    code = "repository_unreadable"


class CopyCancelled(RuntimeProblem):
    """The copying or hashing of a version was cancelled."""

    code = "copy_cancelled"
