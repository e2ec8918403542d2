"""Mistakes that people make on the command line: what the command says, and its exit code."""

import json
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import models
from support.clients import every_command, run_command
from support.http import LocalApi
from support.models import save

from server.auth.keys import sign_token

ADMIN, INFER, EXPIRED = "admin", "infer", "expired"
UNKNOWN = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Desk:
    """A server with the models `digits`, which is loaded, and `other`; and files to make mistakes with."""

    server: LocalApi
    folder: Path
    tokens: dict[str, str]
    values: dict[str, object]
    """Values of the placeholders in a typed command."""


@pytest.fixture(scope="module")
def desk(server: LocalApi, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder, data = tmp_path_factory.mktemp("work"), server.config.data
    for model_id in ("digits", "other"):
        save(models.add(), server.config.repository, model_id)
    for name in ("empty", "two"):
        (folder / name).mkdir(parents=True)
    whole = models.add().SerializeToString()
    for name in ("digits.onnx", "two/a.onnx", "two/b.onnx"):
        (folder / name).write_bytes(whole)
    (folder / "cut.onnx").write_bytes(whole[:-20])
    for name in ("note.txt", "text.onnx"):
        (folder / name).write_text("no model, but a long text\n" * 10)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}
    request = {"inputs": [tensor], "parameters": {"sequence_id": 1}}
    (folder / "sequence.json").write_text(json.dumps(request))
    tokens = {role: server.token(role) for role in (ADMIN, INFER)}
    ago = int(time.time()) - 7200
    tokens[EXPIRED] = sign_token(data, "alice", [ADMIN], expires_s=60, audience="loadledger", now_s=ago)
    variables: dict[str, Any] = {"LOADLEDGER_URL": server.url, "LOADLEDGER_TOKEN": tokens[ADMIN]}
    run_command("unload", "digits", **variables)  # another process may have stolen the first tests
    job = json.loads(run_command("load", "digits", "--wait", "--json", **variables).stdout)["id"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]  # nobody listens there once it is closed
    port = server.url.rpartition(":")[2]
    places = {"data": data, "repository": server.config.repository}
    return Desk(server, folder, tokens, {"job": job, "port": port, "free": free, **places})


MISTAKES = [
    # typed, exit code, what is said
    ("laod digits", 2, "there is no command 'laod'; did you mean load or unload?"),
    ("xyzzy", 2, "`loadledger --help` lists them"),
    ("key nope", 2, "nope"),
    ("load .. --wait", 2, "no id of a model"),
    ("load digits --wiat", 2, "No such option '--wiat'. Did you mean '--wait'?"),
    # names of models
    ("show digit", 2, "model 'digit' is not in the repository; did you mean digits? (unknown_model)"),
    ("load digist", 2, "did you mean digits?"),
    ("unload dgits", 2, "did you mean digits?"),
    ("infer ohter x=[1]", 2, "did you mean other?"),
    ("run digts", 1, "did you mean digits?"),
    ("show zzz", 2, "model 'zzz' is not in the repository; `loadledger models` lists them"),
    ("ps digits", 2, "`loadledger show digits`"),
    ("load ..", 2, "no id of a model"),
    ("models digits", 2, "this lists all models; for one, `loadledger show digits`"),
    ("add 'my model' digits.onnx", 2, "'my model': Must be 1 to 128 letters, digits, dots"),
    ("load digits/1 -v 2", 2, "digits/1 names another version than 2: give one of them"),
    ("infer digits/1 x=[1] -v 2", 2, "digits/1 names another version than 2: give one of them"),
    ("load digits/1/2", 2, "'1/2' is no version: give MODEL, or MODEL/VERSION such as digits/2"),
    ("load digits/", 2, "'' is no version"),
    ("show digist/1", 2, "did you mean digits?"),
    (
        "unload other/1",
        2,
        "version 1 of other is not loaded; `loadledger verify-model other/1` shows its files",
    ),
    # files
    ("run nope.onnx", 2, "there is no file or folder nope.onnx"),
    ("add m nope.onnx", 2, "Path 'nope.onnx' does not exist"),
    ("add digits.onnx", 2, "Missing argument 'FILE|DIR|SOURCE'"),
    ("add m digits.onnx --digest sha256:0", 2, "--digest is for a SOURCE, which has ://"),
    ("add m hf://o/m --digest 1", 2, "it takes sha256: and 64 hexadecimal digits"),
    ("add m https://u:p@host/m.onnx", 2, "credentials come from variables and files of yours"),
    ("add m digits.onnx --into . --load", 2, "load it once the server has the folder"),
    ("run digits.onnx --digest sha256:0", 2, "--digest is for a SOURCE, which has ://"),
    ("add m hf://o/m --signature note.txt", 2, "is for a FILE or DIR"),
    ("run ftp://host/m.onnx", 2, "is no source: begin it with https://, hf://"),
    ("run https://host/model.onnx", 2, "has no name for a model: give one with --name"),
    ("run note.txt", 1, "note.txt is a text and no model"),
    ("add text text.onnx", 2, "text.onnx is a text and no model"),
    ("run cut.onnx", 1, "copy it again"),
    ("run empty", 1, "empty has no .onnx file"),
    ("run two", 1, "two has several models, a.onnx, b.onnx: give the file itself"),
    ("add m two", 2, "give the file itself"),
    # versions
    ("load digits -v 7", 2, "model 'digits' has no version 7; `loadledger show digits` lists its versions"),
    ("load digits -v v1", 2, "'v1' is not a valid whole number"),
    ("add digits digits.onnx -v 1", 2, "a version is never overwritten: choose another number"),
    (
        "rm digits -v 1",
        2,
        "or load another version, and remove it then; `loadledger rm --force` ends its loads",
    ),
    ("rm digits", 2, "name the version, too: digits/VERSION"),
    ("rm other -v 9", 2, "`loadledger show other` lists its versions"),
    # labels
    ("label digits champion", 2, "give LABEL with a VERSION that it names, or with --remove"),
    ("label digits champion 1 --remove", 2, "give LABEL with a VERSION that it names, or with --remove"),
    ("label digits --remove", 2, "give the LABEL that --remove removes"),
    ("label digits 3 champion", 2, "'champion' is not a valid integer range"),
    ("label digits 3 1", 2, "'3': Must begin with a letter"),
    ("infer digits x=[1] -v 1x", 2, "--version 1x: Must begin with a letter"),
    ("load digits --label 3", 2, "--label 3: Must begin with a letter"),
    ("label digits champion 7", 2, "`loadledger show digits` lists its versions"),
    ("label digits champion --remove", 2, "`loadledger show digits` shows those that it has"),
    ("infer digits x=[1] -v champion", 2, "`loadledger show digits` shows those that it has"),
    # loads and jobs
    ("load digits", 0, ""),
    ("load other --memory-limit-bytes '2 gigs'", 2, "'2 gigs' is refused. Must be bytes, or a number of MB"),
    ("load other --timeout-s 10m", 2, "'10m' is not a valid number of seconds"),
    ("load other --timeout-s 99999", 2, "--timeout-s 99999: Must be greater than or equal to 1 and less"),
    ("load other --priority urgent", 2, "'urgent' is not one of 'high', 'normal', 'low'"),
    ("unload other", 2, "model 'other' is not loaded; `loadledger ps` lists loaded models"),
    ("unload", 2, "name a model; the active one, which --active unloads, is digits"),
    ("kill digits --active", 2, "not both"),
    (
        "job digits",
        2,
        "digits has no open job; its last one is:\n  loadledger job {job}  (load of digits version",
    ),
    ("job digist", 2, "digist has no job; `loadledger jobs` lists them"),
    (f"job {UNKNOWN}", 2, f"there is no job '{UNKNOWN}'; `loadledger jobs` lists them"),
    ("cancel {job}", 2, "job {job} has ended; `loadledger job {job}` shows how"),
    ("approve digits/1", 2, "there is no terminal to ask at: give --reason TEXT and --yes"),
    ("approve digits --reason x --yes", 2, "name the version, too: digits/VERSION"),
    ("verify-model digits/v1", 2, "'v1' is no version: give MODEL, or MODEL/VERSION such as digits/2"),
    # inferences
    ("infer digits x=[1,", 2, "is not JSON"),
    ("infer digits x=[1e400]", 2, "1e400 is out of range"),
    ("infer digits image=[1]", 2, "no input 'image'; it has x"),
    ("infer digits x=[[1,2],[3,4]]", 2, "takes [-1]"),
    ("infer digits x=@nope.npy", 2, "nope.npy cannot be read"),
    ("infer digits x=[[1],[2,3]]", 2, "same length"),
    ("infer digits x=[1] x=[2]", 2, "'x' is given twice"),
    ("infer digits x=1 --size 0x3", 2, "is not like 224x224"),
    ("infer digits x=1 --mean a", 2, "is not a number for all channels"),
    ("infer digits x=[1] --out y.csv", 2, ".npy or .npz"),
    ("infer digits note.txt", 2, "is not JSON"),
    ("infer digits @sequence.json", 2, "sequence_id"),
    ("infer digits x=[1] -v 3", 2, "`loadledger show digits` lists its versions"),
    ("infer other x=[1]", 2, "model 'other' is not loaded; load it with `loadledger load other --wait`"),
    # times and events
    ("events --since 'last tuesday'", 2, "'last tuesday' is refused. Must be 10m, 2h or 3d (ago), now"),
    ("events --type Loaded", 2, "--type Loaded: Must be one of: LoadRequested"),
    ("models --at 2020-01-01T00:00:00Z", 2, "2020-01-01T00:00:00Z is before the first event, of 2"),
    ("models --at 99999", 2, "there is no 99999 yet"),
    # servers
    ("models --url 127.0.0.1:{port}", 2, "does not begin with http:// or https://"),
    ("models --url https://127.0.0.1:{port}", 2, "it has no TLS, use http://"),
    ("models --url http://127.0.0.1:{free}", 2, "is the server running, and is this its URL?"),
    ("models --profile staging", 2, "`loadledger login` creates one"),
    ("drain n1", 2, "This server is alone"),
    ("serve --memory-budget '20 GB'", 2, "--memory-budget: '20 GB' is refused. Must be"),
    ("serve --prot 1", 2, "'--port'"),
    ("serve --repository nope --data new", 2, "'nope' is not a directory; create it or name another"),
    # tokens and ledgers
    ("login", 2, "there is no token on standard input"),
    ("token --data {data} --role root --subject x", 2, "'root' is not one of 'admin', 'infer', 'audit'"),
    ("token --data {data}", 2, "Missing option '--role'"),
    ("token --data {data} --role admin --subject x --expires '1 week'", 2, "Must be a duration like 90s"),
    ("token --data nope --role admin --subject x", 2, "start the server first"),
    ("token revoke nope", 2, "`loadledger token list` lists them"),
    ("token list --data {data} --url http://h", 2, "not both"),
    ("token revoke nope --data {data}", 2, "`loadledger token list` lists them"),
    ("verify --data nope", 2, "name the data directory with --data"),
    ("backup nope/x.db --data {data}", 2, "nope/x.db: No such file or directory"),
]
"""Of an admin."""

WITHOUT_RIGHTS = [
    # the token, what is said
    (None, "This needs a token; set LOADLEDGER_TOKEN, or save one with `loadledger login`"),
    ("nonsense", "get a new one: `loadledger token --role admin --subject NAME` creates one"),
    ("a b", "give it without spaces"),
    (EXPIRED, "the token has expired; get a new one"),
    (INFER, "this needs one of the roles {roles}; the token has infer"),
]


@pytest.mark.parametrize(("typed", "code", "said"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_mistake_ends_with_its_cure(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, typed: str, code: int, said: str
) -> None:
    monkeypatch.chdir(desk.folder)
    variables: dict[str, Any] = {"LOADLEDGER_URL": desk.server.url, "LOADLEDGER_TOKEN": desk.tokens[ADMIN]}
    result = run_command(*shlex.split(typed.format(**desk.values)), HOME=str(desk.folder), **variables)
    assert (result.exit_code, result.stdout == "") == (code, code != 0), result.output
    assert said.format(**desk.values) in result.stderr
    for word in ("GET /", "POST /", "path:", "body:", "query:", "Errno", "None"):
        assert word not in result.stderr


OF_VERSIONS = {
    "run": ("run digits/1", 0, "digits version 1: loaded"),
    "check": ("check digits/9 --repository {repository}", 1, "version 9"),
    "add": ("add digits/1 digits.onnx", 2, "a version is never overwritten"),
    "rm": ("rm digits/9", 2, "model 'digits' has no version 9"),
    "load": ("load digits/1", 0, "digits version 1: "),
    "unload": ("unload digits/2", 2, "not loaded; `loadledger unload digits` is about version 1"),
    "show": ("show digits/1", 0, "digits: loaded"),
    "label": ("label digits/1", 0, "no labels"),
    "verify-model": ("verify-model digits/1", 0, "digits version 1:"),
    "infer": ("infer digits/1 x=[1]", 0, "digits version 1\n"),
    "job": ("job digits/1", 2, "digits/1 has no open job; its last one is:\n  loadledger job {job}"),
    "cancel": ("cancel digits/9", 2, "digits/9 has no job"),
    "approve": ("approve digits/9 --reason x --yes", 2, "model 'digits' has no version 9"),
    "jobs --model": ("jobs --model digits/9", 0, "no jobs\n"),
    "events": ("events digits/1 other/9", 0, "ModelLoaded      digits/1"),
    "events --model": ("events --model digits/9", 0, ""),
    "records list --model": ("records list --model digits/1", 2, "give --model without /VERSION"),
    "records read --model": ("records read --model digits/9", 0, ""),
    "replay --model": ("replay --data {data} --model digits/1", 2, "give --model without /VERSION"),
}
"""Of each command that takes a model, one with MODEL/VERSION, its exit code, and what is said."""


@pytest.mark.parametrize("command", OF_VERSIONS)
def test_model_is_taken_with_its_version(desk: Desk, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(desk.folder)
    typed, code, said = OF_VERSIONS[command]
    variables: dict[str, Any] = {"LOADLEDGER_URL": desk.server.url, "LOADLEDGER_TOKEN": desk.tokens[ADMIN]}
    result = run_command(*shlex.split(typed.format(**desk.values)), HOME=str(desk.folder), **variables)
    assert (result.exit_code, said.format(**desk.values) in result.output) == (code, True), result.output


def test_table_of_versions_has_every_command_that_takes_a_model() -> None:
    found = {
        f"{name} --model" if "--model" in each.opts else name
        for name, command in every_command().items()
        for each in command.params
        if "--model" in each.opts or "MODEL" in each.human_readable_name.upper() or each.name == "model"
    }
    assert found == OF_VERSIONS.keys()


@pytest.mark.parametrize(
    ("command", "roles"),
    [("load digits", "admin"), ("events", "admin, audit"), ("events --follow", "admin, audit")],
)
@pytest.mark.parametrize(("token", "said"), WITHOUT_RIGHTS)
def test_command_without_right_token_says_how_to_get_one(
    desk: Desk, token: str | None, said: str, command: str, roles: str
) -> None:
    given = None if token is None else desk.tokens.get(token, token)
    result = run_command(*command.split(), LOADLEDGER_URL=desk.server.url, LOADLEDGER_TOKEN=given)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert said.format(roles=roles) in result.stderr
    assert "Authorization" not in result.stderr
