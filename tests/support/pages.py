"""Pages of documentation as sessions: their blocks are run in their order, and what they print is compared.

A page has blocks of `sh`, then perhaps of `python`, which are one program; a block of `json` or `text` is
what the one before it prints. A block of any other kind would not be held to anything, so there may be none.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PORT = "8080"
END = "-- end of the block --"
LIMIT_S = 120.0
"""Nothing here takes this long; it is there so that a bug fails a test and does not hang it."""


@dataclass(frozen=True, slots=True)
class Block:
    """What is run, and what it has to print; None where the page does not say."""

    kind: str
    text: str
    answer_kind: str = ""
    answer: str | None = None


def blocks(page: str) -> list[Block]:
    """Return the page's blocks in their order."""
    found: list[Block] = []
    for kind, text in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if kind in ("sh", "python"):
            found.append(Block(kind, text))
        else:
            assert kind in ("json", "text"), f"a block of {kind or 'no kind'} is not held to anything"
            asked = found.pop()
            assert asked.answer is None, f"two answers to {asked.text}"
            found.append(Block(asked.kind, asked.text, kind, text))
    kinds = [block.kind for block in found]
    assert kinds == sorted(kinds, reverse=True), "sh after python"
    return found


def run_page(
    page: str, folder: Path, port: str, environment: Mapping[str, str]
) -> Iterator[tuple[Block, str]]:
    """Run the page in the folder; gives each block and what it printed.

    Args:
        page: path of the page in the tree.
        folder: the working directory.
        port: of the server, where the page says 8080.
        environment: of the shell.
    """
    found = blocks(page)
    command = ["bash", "--noprofile", "--norc", "-eu", "-o", "pipefail", "-c", script(found)]
    done = subprocess.run(
        [part.replace(PORT, port) for part in command],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    printed = done.stdout.split(f"{END}\n")
    assert len(printed) == len(found) + 1, done.stdout
    yield from zip(found, printed, strict=False)


def script(found: list[Block]) -> str:
    """Return the blocks as one program of the shell."""
    shell = [f"{block.text}\necho '{END}'\n" for block in found if block.kind == "sh"]
    python = [f"{block.text}\nprint('{END}', flush=True)\n" for block in found if block.kind == "python"]
    if python:
        shell.append(f"{sys.executable} -W error - <<'THE-END'\n{''.join(python)}\nTHE-END\n")
    return "".join(shell)


def printed_as(block: Block, printed: str) -> Any:
    """Return what a block printed, so that it can be compared: of text, white space may differ."""
    return json.loads(printed) if block.answer_kind == "json" else printed.split()


def expected(block: Block) -> Any:
    """Return what the page says that it prints, alike."""
    assert block.answer is not None
    return printed_as(block, block.answer)
