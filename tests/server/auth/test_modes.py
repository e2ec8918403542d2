"""Which owners and modes let another user change what decides who may do what."""

import os
import pwd
import sys
from pathlib import Path

import pytest
from support.namespaces import isolated

from server.auth.modes import find_risk

EVERY = "every user of this machine"
NOBODY = 65534
OWN_GROUP = 54321
"""A group of no user, as that of a volume in a container is."""
MOUNT = """
set -e
mount -t tmpfs -o mode=1777 none {folder}
echo key > {folder}/key; chmod {mode} {folder}/key
mount -o remount,bind,ro {folder}
exec {python} -P -c '
import sys
from pathlib import Path
from server.auth.modes import find_risk
print(find_risk(Path(sys.argv[1])), find_risk(Path(sys.argv[1]) / "key", is_private=True))' {folder}
"""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a key"
    path.touch()
    return path


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o601, 0o640, 0o644, 0o755])
def test_safe_mode_is_accepted(path: Path, mode: int) -> None:
    path.chmod(mode)
    assert find_risk(path) is None
    assert (find_risk(path, is_private=True) is None) == (not mode & 0o007)


@pytest.mark.parametrize(
    ("mode", "is_private", "act", "mend"),
    [
        (0o666, False, "change it", "chmod go-w"),
        (0o602, True, "change it", "chmod 0600"),
        (0o604, True, "read the key", "chmod 0600"),
    ],
)
def test_risk_names_mode_act_and_command(
    path: Path, mode: int, act: str, mend: str, *, is_private: bool
) -> None:
    path.chmod(mode)
    found = find_risk(path, is_private=is_private)
    assert found == f"{path} has mode {mode:04o}: {EVERY} could {act}; `{mend} '{path}'`"


def test_directory_that_all_may_write_is_a_risk(tmp_path: Path) -> None:
    for mode in (0o777, 0o1777, 0o703):
        tmp_path.chmod(mode)
        assert f"mode {mode:04o}: {EVERY} could replace what is in it" in str(find_risk(tmp_path))


def test_link_is_followed_and_a_missing_file_is_no_risk(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    path.chmod(0o666)
    assert "mode 0666" in str(find_risk(link))
    path.unlink()
    assert find_risk(link) is None


@only_root
def test_group_may_write_if_no_other_user_is_in_it(path: Path) -> None:
    path.chmod(0o660)
    for group, is_safe in ((OWN_GROUP, True), (pwd.getpwuid(NOBODY).pw_gid, False)):
        os.chown(path, -1, group)
        found = find_risk(path, is_private=True)
        assert (found is None) == is_safe
        assert is_safe or f"the members of group {group} could change it" in str(found)


@only_root
def test_file_of_another_user_is_a_risk(path: Path) -> None:
    os.chown(path, NOBODY, -1)
    assert f"another user ({NOBODY}), who could change it; if its content is right, `chown 0 '" in str(
        find_risk(path)
    )


@pytest.mark.parametrize(("mode", "is_safe"), [("0660", True), ("0664", False)])
def test_read_only_mount_needs_no_mode_against_writing(tmp_path: Path, mode: str, *, is_safe: bool) -> None:
    """As Kubernetes mounts a Secret: its folder has mode 1777, and its files need one against reading."""
    script = MOUNT.format(folder=tmp_path, python=sys.executable, mode=mode)
    with isolated() as namespaces:
        done = namespaces.run("sh", "-c", script)
    assert done.returncode == 0, done
    assert done.stdout.startswith(
        "None None" if is_safe else f"None {tmp_path / 'key'} has mode 0664: {EVERY}"
    )
