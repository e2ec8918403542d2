"""The proc and cgroup file systems as files in a folder."""

from pathlib import Path


class Files:
    """The two file systems, written where a test wants them."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.cgroups = folder / "cgroup"

    def write(self, **contents: str) -> None:
        """Write what is found under /proc: `self_cgroup`, `meminfo`, and so on, with `_` for `/`."""
        self._save(self.proc, {name.replace("_", "/"): text for name, text in contents.items()})

    def cgroup(self, contents: dict[str, str]) -> None:
        self._save(self.cgroups, contents)

    def unified(
        self, own: str, limits: dict[str, str], mount: str = "", *, limit: str = "memory.max"
    ) -> None:
        """Write a hierarchy of cgroup v2: this process's path, and what each folder's limit says."""
        self.write(self_cgroup=own)
        self.cgroup({f"{mount}cgroup.controllers": "cpuset cpu io memory pids\n"})
        self.cgroup({f"{mount}{folder}{limit}": text for folder, text in limits.items()})

    @staticmethod
    def _save(root: Path, contents: dict[str, str]) -> None:
        for path, text in contents.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
