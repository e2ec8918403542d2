"""Write the console's libraries to `server/static/vendor`: `python -m tools.vendored`, or `make vendored`.

Each is a module of a published package, fetched by name and version with npm, without a build step. Browsers
do not resolve bare import specifiers, and an inline import map would weaken the page's policy, so specifiers
become paths. `vendored.json` records the SHA-256 of each published file and of what was written; a test
compares the latter without a network. To update a library, change its version here and run this.
"""

import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

VENDOR = Path(__file__).parent.parent / "server" / "static" / "vendor"
RECORD = "vendored.json"

LIMIT_S = 120
"""A package has at most a few hundred kilobytes; a registry that does not answer ends the command."""

SPECIFIERS = {
    "preact": "./preact.js",
    "preact/hooks": "./hooks.js",
    "@preact/signals-core": "./signals-core.js",
}
"""Bare import specifiers, and the files that they become."""


@dataclass(frozen=True, slots=True)
class Package:
    """A published package.

    Attributes:
        name: in the registry.
        version: exactly one.
        licence: its SPDX identifier; its text is written as `LICENSE-*`.
        files: name here by the path in the package.
    """

    name: str
    version: str
    licence: str
    files: Mapping[str, str]


PACKAGES = (
    Package("preact", "11.2.0", "MIT", {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "hooks.js"}),
    Package("htm", "3.1.1", "Apache-2.0", {"dist/htm.mjs": "htm.js"}),
    Package("@preact/signals", "2.11.4", "MIT", {"dist/signals.mjs": "signals.js"}),
    Package("@preact/signals-core", "1.14.5", "MIT", {"dist/signals-core.mjs": "signals-core.js"}),
    Package("uplot", "1.6.32", "MIT", {"dist/uPlot.esm.js": "uplot.js", "dist/uPlot.min.css": "uplot.css"}),
)


class UnknownSpecifier(Exception):
    """A module imports what is not vendored."""


def rewrite(text: str) -> str:
    """Return a module with relative import specifiers and without the address of its source map.

    Raises:
        UnknownSpecifier: if it imports another package than those in `SPECIFIERS`.
    """

    def replaced(found: re.Match[str]) -> str:
        if found["name"] not in SPECIFIERS:
            raise UnknownSpecifier(f"{found['name']} is imported; add it to PACKAGES and SPECIFIERS")
        return f'{found["from"]}"{SPECIFIERS[found["name"]]}"'

    text = re.sub(r'(?P<from>\b(?:from|import)\s*)"(?P<name>[\w@][\w@/-]*)"', replaced, text)
    return re.sub(r"//# sourceMappingURL=\S+\s*$", "\n", text)


def fetch(package: Package, folder: Path) -> tarfile.TarFile:
    """Fetch a package with npm and return the open archive."""
    command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(  # noqa: S603 - names and versions of ours
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=LIMIT_S
    )
    return tarfile.open(folder / done.stdout.strip().splitlines()[-1])


def write_files(package: Package, archive: tarfile.TarFile) -> Iterator[dict[str, str]]:
    """Write the files of a package; yield the record of each."""
    licence = f"LICENSE-{package.name.removeprefix('@').replace('/', '-')}.txt"
    for path, name in {**package.files, "LICENSE": licence}.items():
        member = archive.extractfile(f"package/{path}")
        if member is None:
            raise FileNotFoundError(f"{package.name} {package.version} has no file {path}")
        published = member.read()
        written = rewrite(published.decode()).encode() if name.endswith(".js") else published
        (VENDOR / name).write_bytes(written)
        hashes = {"published": sha256(published).hexdigest(), "written": sha256(written).hexdigest()}
        yield {"file": name, "from": path, **hashes}


def main() -> None:
    """Fetch all packages, and write their files and the record."""
    VENDOR.mkdir(exist_ok=True)
    record = []
    for package in PACKAGES:
        with tempfile.TemporaryDirectory() as folder, fetch(package, Path(folder)) as archive:
            about = {"package": package.name, "version": package.version, "licence": package.licence}
            record.append({**about, "files": list(write_files(package, archive))})
    (VENDOR / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
