"""Another user of the machine, who can write where that is kept which decides who is an administrator.

`make hostile` tries each unsafe mode at each place; the suite tries one.
"""

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.clients import run_command
from support.fleet import of_both
from support.http import LocalApi, application, when
from support.servers import refused_start
from support.signing import make_key, public_pem

from events.sqlite.datalock import LEDGER
from server.auth.keys import (
    LEDGER_KEY,
    KeyProblem,
    create_key,
    ensure_data_dir,
    keys_folder,
    list_keys,
    sign_token,
)
from server.config import Config

NOBODY = 65534
as_nobody = pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to act as the user nobody")
REPLACE_KEYS = 'mv keys kept && mkdir keys && cat > "keys/$1"'
ADD_KEY = 'cat > "keys/$1"'


def attack(data: Path, script: str) -> str:
    """As the user nobody, lay a key of nobody's into the data directory; returns an admin's token of it."""
    own = data.with_name("own")
    kid = create_key(own)
    key = keys_folder(own) / f"{kid}.pem"
    subprocess.run(
        ["sh", "-c", f"umask 077; {script}", "sh", key.name],
        input=key.read_bytes(),
        cwd=data,  # entered before the user changes: nobody may not pass the directories above
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        check=True,
    )
    return sign_token(own, "mallory", ["admin"], expires_s=600, audience="loadledger")


async def status_of(api: LocalApi, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"}
    return (await api.send("GET", "/api/v1/models", roles=(), headers=headers)).status


async def test_writable_data_directory_refuses_the_start(config: Config) -> None:
    ensure_data_dir(config.data)
    config.data.chmod(0o777)
    assert f"{config.data} has mode 0777: every user of this machine" in await refused_start(config)


@as_nobody
def test_keys_of_another_user_are_refused(config: Config) -> None:
    ensure_data_dir(config.data)
    config.data.chmod(0o777)
    attack(config.data, REPLACE_KEYS)
    config.data.chmod(0o700)  # as the message says; the keys are still nobody's
    with pytest.raises(KeyProblem, match=rf"keys belongs to another user \({NOBODY}\)"):
        ensure_data_dir(config.data)


@pytest.mark.parametrize(
    ("script", "opened"), [(REPLACE_KEYS, "."), (ADD_KEY, "keys")], ids=["replaced folder", "added file"]
)
@as_nobody
async def test_key_of_another_user_opens_nothing(
    config: Config, script: str, opened: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the mode was changed while the server runs."""
    config.repository.mkdir(exist_ok=True)
    async with application(replace(config, limit_auth_failures="off")) as api:
        assert await status_of(api, api.token("admin")) == 200
        config.data.chmod(0o755)
        (config.data / opened).chmod(0o777)
        token = attack(config.data, script)

        async def refusals() -> tuple[int, str]:
            return await status_of(api, token), caplog.text

        await when(refusals, lambda seen: seen[0] == 200 or "another user" in seen[1])
        assert await status_of(api, token) == 401


PLACES: dict[str, Callable[[Config], Path]] = {
    "data directory": lambda config: config.data,
    "folder of keys": lambda config: keys_folder(config.data),
    "signing key": lambda config: keys_folder(config.data) / f"{list_keys(config.data)[0].kid}.pem",
    "ledger's key": lambda config: config.data / LEDGER_KEY,
    "ledger": lambda config: config.data / LEDGER,
    "policy": lambda config: config.repository / "server.toml",
    "key of a rule": lambda config: config.repository / "rule.pub",
    "provider's key": lambda config: config.repository / "provider.pem",
}
MODES = of_both(short=(0o666,), long=tuple(0o600 | bits for bits in range(0o100) if bits & 0o002))


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_what_others_may_write_is_refused(config: Config, place: Callable[[Config], Path]) -> None:
    """`serve` refuses what `check` does."""
    ensure_data_dir(config.data)
    (config.data / LEDGER).touch(0o600)
    for name in ("rule.pub", "provider.pem"):
        (config.repository / name).write_text(public_pem(make_key()))
    rule = '[[trust]]\nmodels = ["*"]\nmode = "enforce"\nkeys = ["rule.pub"]\n'
    (config.repository / "server.toml").write_text(f'jwt_keys = "provider.pem"\n{rule}')
    path = place(config)
    for mode in (each | (0o111 if path.is_dir() else 0) for each in MODES):
        path.chmod(mode)
        folders = (f"--repository={config.repository}", f"--data={config.data}", "--port=0")
        found = run_command("check", *folders, f"--config={config.repository / 'server.toml'}")
        assert found.exit_code == 1
        assert re.search(rf"{path} has mode {mode:04o}: .*; `chmod ", found.output)
