from __future__ import annotations

import contextlib
import json
import random
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import zmq

from daemon.client import Control, RequestFailed, Subscription
from tests.system.line import REPOSITORY, free_port
from tests.system.test_run import SYNTHETIC, assert_well_formed

SLOW = {**SYNTHETIC, "rate_fps": 20}
COMMANDED = {**SYNTHETIC, "trigger": "command"}


def control_of(bench):
    return Control(f"ipc://{bench.state / 'control.sock'}")


def replay_endpoint(bench):
    return f"ipc://{bench.state / 'replay.sock'}"


def cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_commanded_triggers_give_one_verdict_each_with_their_ids(line):
    bench = line(COMMANDED).start()
    bench.receive_until(lambda: bench.health)
    with control_of(bench) as control:
        for n in range(1, 6):
            result, _ = control.request("trigger", id=f"t{n}", part=f"P-{n}")
            assert result == {"trigger": f"t{n}", "part": f"P-{n}"}
        bench.receive_until(lambda: len(bench.verdicts) == 5)
    assert [(v["sequence"], v["trigger"], v["part"]) for v in bench.verdicts] == [
        (n, f"t{n}", f"P-{n}") for n in range(1, 6)
    ]
    assert {v["verdict"] for v in bench.verdicts} <= {"OK", "NG"}
    bench.stop()


def test_a_commanded_pylon_camera_is_triggered_and_answers_when_it_is_away(line):
    pytest.importorskip("pypylon", reason="pypylon is not installed")
    emulated = {"driver": "pylon", "serial": "0815-0000", "width": 64, "height": 64, "trigger": "command"}
    emulated["trigger_timeout_ms"] = 60_000
    bench = line(
        {**emulated, "exposure_us": 100}, plausible={"frozen_frames": 0}, verdict={"deadline_ms": 60_000}
    ).start()
    bench.receive_until(lambda: bench.health and bench.health[-1]["camera"]["connected"])
    with control_of(bench) as control:
        for _ in range(3):
            control.request("trigger")
    bench.receive_until(lambda: len(bench.verdicts) == 3)
    assert {v["verdict"] for v in bench.verdicts} <= {"OK", "NG"}
    bench.stop()

    away = line({**emulated, "serial": "not-connected"}).start()
    away.receive_until(lambda: away.health)
    with control_of(away) as control:
        control.request("trigger", part="P-9")
    away.receive_until(lambda: away.verdicts)
    (verdict,) = away.verdicts
    assert (verdict["verdict"], verdict["reason"], verdict["part"]) == ("INVALID", "camera", "P-9")
    away.stop()


def test_status_pause_resume_and_stop_by_the_command_line(line):
    bench = line(SLOW).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 3)
    done = cli("ctl", "status", "-c", bench.path)
    status = json.loads(done.stdout)
    assert (done.returncode, status["state"], status["station"]) == (0, "running", "bench")
    assert status["seen"] == status["ok"] + status["ng"] + status["invalid"] + status["in_flight"]
    assert status["journal"]["error"] is None
    assert status["camera"]["alive"]
    assert json.loads(cli("ctl", "pause", "-c", bench.path).stdout) == {"state": "paused"}

    def idle(health):  # the camera is closed once the last grab has ended
        return health["state"] == "paused" and health["in_flight"] == 0 and not health["camera"]["connected"]

    bench.receive_until(lambda: bench.health and idle(bench.health[-1]))
    paused_at = bench.health[-1]["last_sequence"]
    bench.receive_until(lambda: sum(h["state"] == "paused" for h in bench.health) >= 3)
    assert bench.health[-1]["last_sequence"] == paused_at, "nothing is grabbed meanwhile"
    assert json.loads(cli("ctl", "resume", "-c", bench.path).stdout) == {"state": "running"}
    bench.receive_until(lambda: bench.sequences()[-1] > paused_at + 2)
    assert cli("ctl", "stop", "-c", bench.path).returncode == 0
    code, _ = bench.finish()
    assert code == 0
    assert bench.sequences() == list(range(1, len(bench.verdicts) + 1))
    done = cli("ctl", "status", "-c", bench.path)
    assert done.returncode == 1
    assert "does the daemon run, and ask for keys?" in done.stderr


def test_snapshot_and_capture(line, tmp_path):
    bench = line({**SLOW, "defect_rate": 0}, threshold=1e9).start()
    bench.receive_until(lambda: bench.verdicts)
    picture = tmp_path / "now.png"
    done = cli("ctl", "snapshot", "-c", bench.path, "-o", picture)
    assert done.returncode == 0, done.stderr
    plain = cv2.imread(str(picture))
    assert plain.shape == (96, 96, 3)
    done = cli("ctl", "snapshot", "--overlay", "-c", bench.path, "-o", picture)
    assert done.returncode == 0, done.stderr
    laid_over = cv2.imread(str(picture))
    assert laid_over.shape == plain.shape
    assert laid_over.mean() < 0.6 * plain.mean(), "dark where nothing is found"
    done = cli("ctl", "capture", "99999", "--name", "too-many", "-c", bench.path)
    assert json.loads(done.stdout)["replaced"] is None
    done = cli("ctl", "capture", "4", "--name", "lamp2", "-c", bench.path)
    assert json.loads(done.stdout)["replaced"]["wanted"] == 99999
    folder = Path(json.loads(done.stdout)["folder"])
    bench.receive_until(lambda: len(list(folder.glob("*.png"))) == 4)
    again = cli("ctl", "capture", "4", "--name", "lamp2", "-c", bench.path)
    assert (again.returncode, "choose another name" in again.stderr) == (1, True)
    bench.stop()


def test_a_wrong_command_is_refused_with_its_reason(line):
    bench = line(SLOW).start()
    bench.receive_until(lambda: bench.verdicts)
    with control_of(bench) as control:
        with pytest.raises(RequestFailed, match=r"set camera.trigger: command"):
            control.request("trigger")
        with pytest.raises(RequestFailed, match="explode"):
            control.request("explode")
        with pytest.raises(RequestFailed, match="count"):
            control.request("capture", count=-1)
        assert control.request("status")[0]["state"] == "running"
    bench.stop()


def test_the_control_socket_is_for_the_services_group_only(line):
    bench = line(SLOW).start()
    bench.receive_until(lambda: bench.health)
    assert (bench.state / "control.sock").stat().st_mode & 0o777 == 0o660
    bench.stop()


def test_garbage_never_disturbs_the_line(line):
    """Fuzz both ROUTER sockets with whatever a message can hold, then see that they still answer."""
    bench = line(SLOW).start()
    bench.receive_until(lambda: bench.verdicts)
    generator = random.Random(5)
    valid = [b'{"command":"status"}', b'{"replay":{"from":1}}', b'{"command":"capture","count":3,"name":"x"}']
    with zmq.Context() as context:
        for endpoint in (f"ipc://{bench.state / 'control.sock'}", replay_endpoint(bench)):
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.LINGER, 2000)
                dealer.connect(endpoint)
                for _ in range(300):
                    body = bytearray(generator.choice(valid))
                    for _ in range(generator.randrange(1, 6)):
                        body[generator.randrange(len(body))] = generator.randrange(256)
                    dealer.send_multipart([bytes(body)][: generator.randrange(1, 2)])
                dealer.send_multipart([b""] * 20)
                dealer.send_multipart([generator.randbytes(100_000)])  # beyond the limit: libzmq hangs up
    with control_of(bench) as control:
        status, _ = control.request("status")
    assert status["state"] in ("running", "paused")
    before = len(bench.verdicts)
    bench.receive_until(lambda: len(bench.verdicts) > before + 5)
    code, _ = bench.stop()
    assert code == 0
    assert bench.sequences() == list(range(1, len(bench.verdicts) + 1))


def test_a_late_joiner_gets_the_last_verdict_at_once_on_an_idle_line(line):
    bench = line(COMMANDED).start()
    bench.receive_until(lambda: bench.health)
    with control_of(bench) as control:
        for n in range(3):
            control.request("trigger", part=f"P-{n}")
    bench.receive_until(lambda: len(bench.verdicts) == 3)
    with Subscription(bench.verdict_endpoint, replay_endpoint(bench), "bench") as subscription:
        assert subscription.next_verdict(60)["part"] == "P-2"
        assert subscription.next_verdict(0.2) is None
    bench.stop()


def test_a_subscription_misses_nothing_over_kill_9_and_restarts(line):
    bench = line({**SYNTHETIC, "rate_fps": 60}, threads=1, journal={"wait_ms": 10_000})
    seen, boots = [], set()
    with Subscription(bench.verdict_endpoint, replay_endpoint(bench), "bench", start=1) as subscription:
        for _ in range(4):
            bench.start()
            target = len(seen) + 25
            while len(seen) < target or seen[-1]["boot"] in boots:
                verdict = subscription.next_verdict(60)
                assert verdict is not None, bench.read_log()
                seen.append(verdict)
            boots.add(seen[-1]["boot"])
            bench.process.kill()
            bench.process.wait()
        bench.start()
        target = len(seen) + 10
        while len(seen) < target or seen[-1]["boot"] in boots:
            seen.append(subscription.next_verdict(60))
        assert subscription.missing == []
    bench.stop()
    assert [v["sequence"] for v in seen] == list(range(1, len(seen) + 1))
    assert len({v["boot"] for v in seen}) == 5
    for verdict in seen:
        assert_well_formed(verdict)
        assert verdict["journaled"]


class Relay:
    """A TCP relay that can stop to deliver on the connections that it has, without closing any: a dead switch."""

    def __init__(self, target):
        self._listener, self._target = socket.create_server(("127.0.0.1", 0)), target
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._silent = [False]
        threading.Thread(target=self._accept, daemon=True).start()

    def fall_silent(self):
        self._silent[0], self._silent = True, [False]

    def close(self):
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                for one, other in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(one, other, self._silent), daemon=True).start()

    @staticmethod
    def _copy(one, other, silent):
        with contextlib.suppress(OSError), contextlib.closing(one):
            while data := one.recv(65536):
                if not silent[0]:
                    other.sendall(data)


def test_a_subscription_finds_out_that_the_network_fell_silent(line):
    bench = line(SLOW).start()
    bench.receive_until(lambda: bench.verdicts)
    with contextlib.closing(Relay(int(bench.verdict_endpoint.rsplit(":", 1)[1]))) as relay:
        with Subscription(relay.endpoint, replay_endpoint(bench), "bench", start=1) as subscription:
            numbers = [subscription.next_verdict(60)["sequence"] for _ in range(5)]
            relay.fall_silent()
            numbers += [subscription.next_verdict(60)["sequence"] for _ in range(40)]
        assert numbers == list(range(1, 46))
    bench.stop()


def test_watching_says_that_nothing_is_heard():
    with subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", "watch", f"tcp://127.0.0.1:{free_port()}"],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        try:
            assert any("ask for keys (--secret, --server-key)?" in line for line in watching.stderr)
        finally:
            watching.kill()


def test_a_subscriber_that_comes_late_reads_everything_from_the_journal(line):
    bench = line(SYNTHETIC).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 650)
    with Subscription(bench.verdict_endpoint, replay_endpoint(bench), "bench", start=1) as subscription:
        numbers = []
        while len(numbers) < 640:
            # As one who looks in between, in a cycle of his own, and as one who waits.
            verdict = subscription.next_verdict(0 if len(numbers) < 320 else 60)
            if verdict is not None:
                numbers.append(verdict["sequence"])
    assert numbers == list(range(1, 641))
    bench.stop()


def test_what_nobody_has_any_more_is_said_not_waited_for(line):
    bench = line({**SYNTHETIC, "frames": 20}).start()
    bench.finish()
    with contextlib.closing(sqlite3.connect(bench.state / "journal.sqlite")) as connection:
        connection.execute("DELETE FROM verdicts WHERE sequence < 6")
        connection.commit()
    bench.config["camera"]["frames"] = None
    bench.path.write_text(json.dumps(bench.config))
    bench.start()
    with Subscription(bench.verdict_endpoint, replay_endpoint(bench), "bench", start=1) as subscription:
        assert subscription.next_verdict(60)["sequence"] == 6
        assert subscription.missing == [(1, 5)]
    bench.stop()


def test_what_was_received_is_handed_out_though_the_daemon_has_lost_it():
    """As after a restart without a journal: the answer comes from one that knows nothing of the past."""
    context = zmq.Context()
    live, replay = context.socket(zmq.XPUB), context.socket(zmq.ROUTER)
    endpoints = [f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}" for socket in (live, replay)]
    with Subscription(*endpoints, "lost", start=5) as subscription:
        for _ in range(2):
            assert live.poll(60_000)
            live.recv()
        while not replay.poll(0):  # it asks once it is connected
            assert subscription.next_verdict(0) is None
        client, body = replay.recv_multipart()
        assert json.loads(body)["replay"] == {"from": 5}
        for number in (7, 8, 11):
            verdict = {"sequence": number, "boot": "first"}
            live.send_multipart([b"verdict/lost/", json.dumps(verdict).encode()])
        while len(subscription._ahead) < 3:
            assert subscription.next_verdict(0) is None
        head = {"id": json.loads(body)["id"], "ok": True, "verdicts": 0, "more": False, "next": 10}
        replay.send_multipart([client, json.dumps({**head, "missing": [[5, 9]]}).encode()])
        assert [subscription.next_verdict(60)["sequence"] for _ in range(2)] == [7, 8]
        assert subscription.missing == [(5, 6), (9, 9)]
        client, body = replay.recv_multipart()
        assert json.loads(body)["replay"] == {"from": 10}, "the eleventh waits for the tenth"
    context.destroy(linger=0)
    with pytest.raises(ValueError, match="start is 0; numbers begin with 1"):
        Subscription(*endpoints, "lost", start=0)


def test_verdicts_are_read_from_the_journal_while_the_daemon_runs(line):
    bench = line({**SYNTHETIC, "rate_fps": 50}, journal={"wait_ms": 10_000}).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 20)
    done = cli("verdicts", "-c", bench.path, "--json", "--limit", 10)
    told = [json.loads(text) for text in done.stdout.splitlines()]
    assert told == bench.verdicts[:10], "the journal has what was published, field by field"
    done = cli("verdicts", "-c", bench.path, "--csv", "--verdict", "NG", "--since", "1h")
    header, *rows = done.stdout.splitlines()
    assert header.startswith("sequence,time,verdict,reason,score")
    wanted = [v["sequence"] for v in bench.verdicts if v["verdict"] == "NG"]
    assert [int(row.split(",")[0]) for row in rows][: len(wanted)] == wanted
    for long_ago in ("yesterday", "800000d"):
        assert cli("verdicts", "-c", bench.path, "--since", long_ago).returncode == 2
    assert cli("verdicts", "-c", bench.path, "--first", 2**70).returncode == 2
    done = cli("verdicts", "-c", bench.path, "--until", "9999-12-31", "--limit", 1)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    bench.stop()
    assert len(cli("verdicts", "-c", bench.path).stdout.splitlines()) == len(bench.verdicts)


def test_kept_images_are_judged_again(line, tiny_bundle):
    bench = line({**SYNTHETIC, "frames": 12}, threshold=-1.0, images={"reserve_mib": 0}).start()  # everything is NG
    bench.finish()
    images = bench.state / "images"
    assert len(list(images.rglob("*.json"))) == 12
    done = cli("replay-images", images, "--model", tiny_bundle, "--threshold", "-1.0")
    assert "12 images: 0 would change, 0 cannot be read" in done.stdout
    done = cli("replay-images", images, "--model", tiny_bundle, "--threshold", "1000")
    assert done.stdout.count("CHANGED") == 12
    cut, huge, empty = sorted(images.rglob("*.png"))[:3]
    cut.write_bytes(cut.read_bytes()[:200])
    picture = bytearray(huge.read_bytes())
    picture[16:24] = struct.pack(">II", 100_000, 100_000)
    picture[29:33] = struct.pack(">I", zlib.crc32(picture[12:29]))
    huge.write_bytes(picture)
    empty.write_bytes(b"")
    done = cli("replay-images", images, "--model", tiny_bundle)
    assert (done.returncode, "3 cannot be read" in done.stdout) == (1, True), done.stderr


def reloaded(bench, **changes):
    bench.path.write_text(json.dumps({**bench.config, **changes}))  # JSON is YAML
    return cli("ctl", "reload", "-c", bench.path)


def test_reload_under_load_changes_the_verdicts_between_two_frames_and_loses_none(line, tiny_bundle, tmp_path):
    import shutil

    bench = line({**SYNTHETIC, "rate_fps": 40}, threads=1).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 10)
    done = reloaded(bench, threshold=1234.5)
    assert done.returncode == 0, done.stderr
    bench.receive_until(lambda: bench.verdicts[-1]["threshold"] == 1234.5)
    for changes, said in (
        ({"model": str(tmp_path / "nowhere")}, "no such folder"),
        ({"publish": {"verdicts": "tcp://127.0.0.1:1"}}, "cannot change while running: publish"),
        ({"treshold": 3}, "unknown key"),
    ):
        done = reloaded(bench, **changes)
        assert (done.returncode, said in done.stderr) == (1, True), done.stderr
    bench.path.write_text(json.dumps({**bench.config, "station": "other"}))
    with control_of(bench) as control, pytest.raises(RequestFailed, match="while running: station; restart"):
        control.request("reload")
    damaged = shutil.copytree(tiny_bundle, tmp_path / "damaged")
    (damaged / "weights.safetensors").write_bytes(b"x" * 1000)
    done = reloaded(bench, model=str(damaged))
    assert (done.returncode, "weights.safetensors" in done.stderr) == (1, True)
    before = len(bench.verdicts)
    bench.receive_until(lambda: len(bench.verdicts) > before + 5)
    assert bench.verdicts[-1]["threshold"] == 1234.5, "the old one goes on"
    code, _ = bench.stop()
    assert code == 0
    assert bench.sequences() == list(range(1, len(bench.verdicts) + 1))
    assert [e["message"] for e in bench.events if e["event"] == "reload"][:1] == ["reloaded"]


def test_sighup_reloads_and_takes_another_camera(line):
    import signal

    bench = line({**SYNTHETIC, "rate_fps": 20, "seed": 3}).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 3)
    bench.path.write_text(json.dumps({**bench.config, "camera": {**SYNTHETIC, "rate_fps": 20, "width": 128}}))
    bench.process.send_signal(signal.SIGHUP)
    bench.receive_until(lambda: bench.verdicts[-1]["frame"]["width"] == 128)
    bench.stop()
    assert bench.sequences() == list(range(1, len(bench.verdicts) + 1))


def test_a_camera_that_a_reload_brought_is_not_forgotten_by_the_next(line):
    bench = line({**SYNTHETIC, "rate_fps": 20}).start()
    bench.receive_until(lambda: len(bench.verdicts) >= 3)
    with control_of(bench) as control:
        control.request("pause")
        other = {**SYNTHETIC, "rate_fps": 20, "width": 128}
        for changes in ({}, {"threshold": 77.0}):  # the second one comes before the camera was taken
            bench.path.write_text(json.dumps({**bench.config, "camera": other, **changes}))
            control.request("reload")
        bench.receive_until(lambda: not bench.receive(0.5))  # what was in flight
        paused_at = len(bench.verdicts)
        control.request("resume")
    bench.receive_until(lambda: len(bench.verdicts) >= paused_at + 3)
    assert next(v["frame"]["width"] for v in bench.verdicts[paused_at:]) == 128, "not one frame of the old one"
    assert bench.verdicts[-1]["threshold"] == 77.0
    bench.stop()


# Keys


@pytest.fixture
def keyed(line, tmp_path):
    keys = tmp_path / "keys"
    for name, rights in (("mes", "subscribe,replay"), ("boss", "subscribe,replay,control"), ("eye", "subscribe")):
        assert cli("keys", "create", name, "--rights", rights, "--keys", keys).returncode == 0
    from tests.system.line import free_port

    ports = [f"tcp://127.0.0.1:{free_port()}" for _ in range(4)]
    bench = line(
        {**SYNTHETIC, "rate_fps": 20},
        publish={"verdicts": ports[0], "maps": ports[1], "replay": ports[2]},
        control={"endpoints": [ports[3], f"ipc://{tmp_path / 'local.sock'}"]},
        security={"keys": str(keys)},
    )
    return bench, keys, ports, tmp_path


def client_keys(folder, name):
    from daemon.client import ClientKeys
    from daemon.keys import KeyFolder

    server, _ = KeyFolder(folder).secret("server")
    return ClientKeys.read(folder / f"{name}.key_secret", server.decode())


def test_rights_hold_for_each_key_and_revoking_ends_connections(keyed):
    bench, keys, (verdicts, _, replay, control), folder = keyed
    listed = cli("keys", "list", "--keys", keys).stdout
    assert "boss" in listed
    bench.start()
    stranger = client_keys(keys, "mes")
    public, secret = zmq.curve_keypair()
    stranger = type(stranger)(public, secret, stranger.server)
    with (
        Subscription(verdicts, replay, "bench", keys=client_keys(keys, "mes")) as mes,
        Subscription(verdicts, replay, "bench", keys=client_keys(keys, "eye"), start="live") as eye,
        Subscription(verdicts, replay, "bench", keys=stranger, start="live") as nobody,
        Subscription(verdicts, replay, "bench", start="live") as plaintext,
    ):
        assert mes.next_verdict(60) is not None
        assert eye.next_verdict(60) is not None
        # They have all had the time that the others needed twice.
        assert nobody.next_verdict(1) is None
        assert plaintext.next_verdict(0.1) is None
        with Control(control, client_keys(keys, "boss")) as boss:
            assert boss.request("status", timeout_s=30)[0]["state"] == "running"
        with (
            Control(control, client_keys(keys, "mes")) as refused,
            pytest.raises(RequestFailed, match="no answer"),
        ):
            refused.request("stop", timeout_s=1.0)

        revoked = client_keys(keys, "eye")
        assert cli("keys", "revoke", "eye", "--keys", keys).returncode == 0
        # Whoever reads the answer too late finds its connection gone; the revocation shows all the same.
        with Control(f"ipc://{folder / 'local.sock'}") as local, contextlib.suppress(RequestFailed):
            local.request("reload", timeout_s=10)
        last = mes.next_verdict(60)["sequence"]
        while eye.next_verdict(0.5) is not None:
            pass
        for wanted in range(last + 1, last + 20):
            assert mes.next_verdict(60)["sequence"] == wanted, (
                "others lose nothing while the sockets are bound anew"
            )
        while eye.next_verdict(0.5) is not None:  # what it had been sent before
            pass
        with Subscription(verdicts, replay, "bench", keys=revoked, start="live") as again:
            assert again.next_verdict(1) is None
    bench.process.terminate()
    assert bench.process.wait(60) == 0


def test_maps_and_verdicts_of_the_same_number_belong_together(line):
    bench = line({**SYNTHETIC, "frames": 10}).start()
    bench.finish()
    scores = {v["sequence"]: v["score"] for v in bench.verdicts}
    for m in bench.maps:
        assert m["score"] == scores[m["sequence"]]
        assert np.isfinite(m["values"]).all()
