"""Owner and mode of files that decide access: no other user may change them, as in ssh's StrictModes.

Two kinds of wide modes are safe, and are accepted:

- the group may write if it has no other user of this machine: a user's own group under umask 002, and the
  group of a Kubernetes volume with `fsGroup`
- on a read-only mount nobody writes: a Secret and a ConfigMap of Kubernetes, a file mounted into a container
"""

import grp
import os
import pwd
import shlex
import stat
from contextlib import suppress
from pathlib import Path

ROOT = 0
WRITABLE = stat.S_IWGRP | stat.S_IWOTH
UNSAFE_FOR_KEY = WRITABLE | stat.S_IRWXO
"""The group may read a private key: Debian (`ssl-cert`) and Kubernetes (`fsGroup`) use that for services."""


def find_risk(path: Path, *, is_private: bool = False) -> str | None:
    """Return what another user could do to a file or directory, and the command that mends it, or None.

    Args:
        path: links are followed; a missing path is no risk.
        is_private: whether others may not even read it.

    Raises:
        OSError: its status cannot be read.
    """
    try:
        found, flags = path.stat(), os.statvfs(path).f_flag
    except FileNotFoundError:
        return None
    is_read_only = bool(flags & os.ST_RDONLY)
    user, name = os.geteuid(), shlex.quote(str(path))
    if found.st_uid not in {user, ROOT} and not is_read_only:
        mend = f"if its content is right, `chown {user} {name}`"
        if user == ROOT:
            mend += ", or run this as that user"
        return f"{path} belongs to another user ({found.st_uid}), who could change it; {mend}"
    unsafe = found.st_mode & (UNSAFE_FOR_KEY if is_private else WRITABLE)
    if is_read_only:
        unsafe &= ~WRITABLE
    if unsafe & stat.S_IWGRP and not _list_members(found.st_gid, besides={user, ROOT}):
        unsafe &= ~stat.S_IWGRP
    if not unsafe:
        return None
    who = "every user of this machine" if unsafe & stat.S_IRWXO else f"the members of group {found.st_gid}"
    if not unsafe & WRITABLE:
        act = "read the key"
    else:
        act = "replace what is in it" if stat.S_ISDIR(found.st_mode) else "change it"
    change = "0600" if is_private else "go-w"
    return f"{path} has mode {stat.S_IMODE(found.st_mode):04o}: {who} could {act}; `chmod {change} {name}`"


def _list_members(group: int, *, besides: set[int]) -> set[str]:
    """Return the users in a group, as far as the machine's databases of users and groups name them."""
    users = pwd.getpwall()
    members = {each.pw_name for each in users if each.pw_gid == group}
    with suppress(KeyError):  # a number without a name, as in a container
        members |= set(grp.getgrgid(group).gr_mem)
    return members - {each.pw_name for each in users if each.pw_uid in besides}
