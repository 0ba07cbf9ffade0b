from __future__ import annotations

import json
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.keys import KeyFolder, KeysError, Right, Security
from daemon.replies import BadRequest, Capture, Replay, Status, Trigger, id_of, read_command, read_replay

# Requests


def test_commands_are_read_with_their_arguments():
    assert read_command(b'{"command": "status", "id": "7"}') == Status(id="7")
    assert read_command(b'{"command": "trigger", "part": "P-1"}') == Trigger(part="P-1")
    assert read_command(b'{"command": "capture", "count": 20, "name": "lamp2"}') == Capture(count=20, name="lamp2")
    replay = read_replay(b'{"id": "a", "replay": {"from": 3, "to": 9}}')
    assert (replay.replay.first, replay.replay.last) == (3, 9)
    assert read_replay(b'{"replay": {}}').replay.first is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"command": "explode"}', "explode"),
        (b'{"command": "status", "force": true}', "force"),
        (b'{"command": "capture", "count": 0}', "count"),
        (b'{"command": "capture", "name": "../../etc"}', "name"),
        (b'{"command": "trigger", "part": 5}', "part"),
        (b'{"id": "x"}', "command"),
        (b"[]", "object"),
        (b"", "truncated"),
    ],
)
def test_what_cannot_be_understood_is_said_with_its_field(body, said):
    with pytest.raises(BadRequest, match=said):
        read_command(body)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.binary(max_size=300), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["id", "command", "replay", "from", "to", "count", "x"]), inner, max_size=5),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_whatever_comes_in_is_a_request_or_a_bad_request(body):
    for read in (read_command, read_replay):
        try:
            found = read(body)
        except BadRequest:
            continue
        assert isinstance(found, Replay) or found.id is not None
    assert len(id_of(body)) <= 128


def test_a_name_that_becomes_a_folder_has_no_line_break():
    assert read_command(b'{"command":"capture","count":3,"name":"x"}').name == "x"
    with pytest.raises(BadRequest):
        read_command(b'{"command":"capture","count":3,"name":"x\\n"}')


# Keys


def test_secrets_are_for_their_owner_only_and_are_found_again(tmp_path):
    folder = KeyFolder(tmp_path / "keys")
    secret = folder.create("plc", [Right.SUBSCRIBE, Right.REPLAY])
    for path in (secret, tmp_path / "keys" / "server.key_secret"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    public, private = folder.secret("plc")
    assert len(public) == len(private) == 40
    (client,) = folder.clients()
    assert (client.name, client.public, client.rights) == ("plc", public, {Right.SUBSCRIBE, Right.REPLAY})


def test_the_daemons_keys_stay_when_clients_come_and_go(tmp_path):
    folder = KeyFolder(tmp_path)
    folder.create("a", [Right.SUBSCRIBE])
    server = folder.secret("server")
    folder.create("b", [Right.CONTROL])
    folder.revoke("a")
    assert folder.secret("server") == server
    assert [client.name for client in folder.clients()] == ["b"]
    assert not (tmp_path / "a.key_secret").exists()


def test_rights_are_asked_for_per_socket_and_a_lost_one_is_noticed(tmp_path):
    folder = KeyFolder(tmp_path)
    folder.create("a", [Right.SUBSCRIBE])
    folder.create("b", [Right.SUBSCRIBE, Right.CONTROL])
    a, b = (folder.secret(name)[0] for name in "ab")
    security = Security(tmp_path)
    assert security.callback("subscribe", a)
    assert not security.callback("control", a)
    assert security.callback("control", b)
    assert not security.callback("subscribe", b"x" * 40)
    folder.create("c", [Right.REPLAY])
    assert security.install(security.read()) is False, "a new client ends nobody's connection"
    folder.revoke("a")
    assert security.install(security.read()) is True
    assert not security.callback("subscribe", a)


def test_the_daemons_secret_may_come_from_systemd(tmp_path, monkeypatch):
    elsewhere = KeyFolder(tmp_path / "credentials")
    elsewhere.create("any", [])
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    assert KeyFolder(tmp_path / "keys").secret("server") == elsewhere.secret("server")


@pytest.mark.parametrize(
    ("text", "said"),
    [("plc: [1, 2]", "each entry is NAME"), ("plc: {public: k, rights: [fly]}", "fly"), ("a: [", "clients.yaml")],
)
def test_a_spoilt_list_of_clients_is_refused(tmp_path, text, said):
    (tmp_path / "clients.yaml").write_text(text)
    with pytest.raises(KeysError, match=said):
        KeyFolder(tmp_path).clients()


@pytest.mark.parametrize("name", ["server", "../x", "", "a b"])
def test_names_that_are_no_names(tmp_path, name):
    with pytest.raises(KeysError, match="cannot be a client's name"):
        KeyFolder(tmp_path).create(name, [])


def test_a_name_is_used_once_and_an_unknown_one_is_said(tmp_path):
    folder = KeyFolder(tmp_path)
    folder.create("a", [])
    with pytest.raises(KeysError, match="exists already; revoke it first"):
        folder.create("a", [])
    with pytest.raises(KeysError, match=r"no client 'b'.*there: a"):
        folder.revoke("b")
    with pytest.raises(KeysError, match="make keys with"):
        Security(tmp_path / "nowhere")
