"""Which paths the files of a version may have. Pure; nothing here looks at a disk."""

from runtime.repository import MAX_FILES, MAX_PATHS_BYTES
from runtime.uploads.problems import BadArchive

MAX_PATH_BYTES = 1024
"""Of one path: file systems take 4096 with the folders above the repository."""
MAX_NAME_BYTES = 255
"""Of one name in it: what ext4 and XFS take."""
MAX_SHOWN_CHARACTERS = 100
"""Of a path in a message."""


def check_path(path: str) -> tuple[str, ...]:
    """Return the names in a relative path, without `.` and the slash at its end.

    Raises:
        BadArchive: `bad_archive`, the path is absolute, leads upwards, is too long, or has a name that is
            empty, too long, or no printable UTF-8.
    """
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if path.startswith("/"):
        raise BadArchive(f"{quote(path)} is an absolute path")
    if ".." in names:
        raise BadArchive(f"{quote(path)} leads out of the folder")
    try:
        is_long = len(path.encode()) > MAX_PATH_BYTES or any(
            len(name.encode()) > MAX_NAME_BYTES for name in names
        )
    except UnicodeEncodeError:
        raise BadArchive(f"{quote(path)} is not UTF-8") from None
    if is_long:
        raise BadArchive(
            f"{quote(path)} is too long: {MAX_PATH_BYTES} bytes, and {MAX_NAME_BYTES} in each name"
        )
    if not path.isprintable():
        raise BadArchive(f"{quote(path)} has characters that cannot be printed")
    return names


def quote(path: str) -> str:
    """Return a path for a message: one printable line of bounded length."""
    shown = path if len(path) <= MAX_SHOWN_CHARACTERS else f"{path[:MAX_SHOWN_CHARACTERS]}…"
    return ascii(shown)


class PathBook:
    """The paths of one version so far: none twice, no file as a folder, and not too many."""

    def __init__(self) -> None:
        self._files = set[tuple[str, ...]]()
        self._folders = set[tuple[str, ...]]()
        self._bytes = 0

    def add_file(self, path: str) -> str:
        """Add a file, and return its path in its one spelling.

        Raises:
            BadArchive: `bad_archive`.
        """
        names = check_path(path)
        if not names:
            raise BadArchive(f"{quote(path)} is no name of a file")
        if names in self._files:
            raise BadArchive(f"{quote(path)} is there twice")
        if names in self._folders:
            raise BadArchive(f"{quote(path)} is a file and a folder")
        self._add_folders(names[:-1])
        self._files.add(names)
        cleaned = "/".join(names)
        self._bytes += len(cleaned.encode())
        self._check_bounds()
        return cleaned

    def add_folder(self, path: str) -> None:
        """Add a folder, which may be there already.

        Raises:
            BadArchive: `bad_archive`.
        """
        self._add_folders(check_path(path))
        self._check_bounds()

    def _add_folders(self, names: tuple[str, ...]) -> None:
        for end in range(1, len(names) + 1):
            if names[:end] in self._files:
                raise BadArchive(f"{quote('/'.join(names[:end]))} is a file and a folder")
            self._folders.add(names[:end])

    def _check_bounds(self) -> None:
        for count, most, what in (
            (len(self._files), MAX_FILES, "files"),
            (len(self._folders), MAX_FILES, "folders"),
            (self._bytes, MAX_PATHS_BYTES, "bytes in the paths of its files"),
        ):
            if count > most:
                raise BadArchive(f"a version may have {most} {what}, and this one has more")
