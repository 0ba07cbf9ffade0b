from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import typer
import yaml

from daemon.addresses import load_addresses
from daemon.cli_errors import clear_errors
from daemon.config import load_config
from daemon.yaml_errors import ConfigError
from pipeline.bundle import read_bundle


@pytest.fixture
def good(tiny_bundle, good_parts):
    return {
        "station": "bench",
        "camera": {"driver": "replay", "path": str(good_parts)},
        "model": str(tiny_bundle),
        "publish": {"verdicts": "tcp://127.0.0.1:5550", "maps": ["ipc:///tmp/maps.sock", "tcp://127.0.0.1:5551"]},
    }


def complaint(tmp_path, text):
    path = tmp_path / "station.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).replace(str(path), "FILE")


def test_a_good_configuration_with_its_defaults(good, tmp_path):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good))
    config = load_config(path)
    assert config.publish.verdicts == ["tcp://127.0.0.1:5550"]
    assert config.publish.maps == ["ipc:///tmp/maps.sock", "tcp://127.0.0.1:5551"]
    assert config.journal_path() == config.state_folder() / "journal.sqlite"
    assert config.control_endpoints() == [f"ipc://{config.state_folder() / 'control.sock'}"]
    assert config.replay_endpoints() == [f"ipc://{config.state_folder() / 'replay.sock'}"]
    assert (config.device, config.slots, config.on_overload, config.threshold) == ("auto", None, None, None)
    assert [config.frame_slots(on_cuda=on_cuda) for on_cuda in (False, True)] == [4, 6], "CUDA judges three at once"
    assert config.model_copy(update={"slots": 5}).frame_slots(on_cuda=True) == 5


def test_the_network_is_closed_without_keys_unless_told_otherwise(good, tmp_path):
    text = "station: s\ncamera: {driver: synthetic}\nmodel: " + good["model"] + "\npublish:\n"
    text += "  verdicts: [tcp://127.0.0.1:5550, tcp://10.0.0.5:5550]\n  replay: 'tcp://*:5552'\n"
    lines = complaint(tmp_path, text).splitlines()
    assert lines[0].startswith("FILE:5: publish.verdicts: tcp://10.0.0.5:5550 is open to the network without keys")
    assert lines[1].startswith("FILE:6: publish.replay: tcp://*:5552 is open to the network")
    path = tmp_path / "station.yaml"
    path.write_text(text + "security: {allow_unencrypted: true}\n")
    assert load_config(path).security.allow_unencrypted


def test_a_deadline_cannot_hold_where_frames_wait(good, tmp_path):
    said = complaint(tmp_path, {**good, "on_overload": "wait", "verdict": {"deadline_ms": 100}})
    assert "verdict.deadline_ms: cannot hold with on_overload: wait" in said


def test_every_problem_is_reported_at_once_with_its_line(good, tmp_path):
    text = """\
station: line/1
camera:
  driver: replay
  path: /nowhere/at/all
  rate_fps: -3
  colour: blue
model: /no/bundle
publish:
  verdicts: tcp://127.0.0.1:99999
treshold: 0.5
"""
    lines = complaint(tmp_path, text).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"FILE:{n}" for n in (1, 4, 5, 6, 7, 9, 10)]
    assert "station: string should match pattern" in lines[0]
    assert "camera.path: nothing there: /nowhere/at/all" in lines[1]
    assert "camera.rate_fps: input should be greater than 0 (given: -3)" in lines[2]
    assert (
        "camera.colour: unknown key; allowed here: driver, frames, loop, path, pixel_format, rate_fps" in lines[3]
    )
    assert "model: /no/bundle: no such folder; train a bundle with" in lines[4]
    assert "publish.verdicts.0: 'tcp://127.0.0.1:99999' is not an endpoint; write tcp://" in lines[5]
    assert "treshold: unknown key; allowed here: camera, control, device, images" in lines[6]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("station: [unclosed\nmodel: x\n", "FILE:2: not valid YAML"),
        ("", "FILE:1: expected keys and values"),
        ("- a\n- b\n", "FILE:1: expected keys and values"),
        ("station: a\nstation: b\n", "FILE:2: station: given twice (also in line 1)"),
        (
            "station: a\ncamera: {driver: webcam}\nmodel: x\n",
            "camera: 'webcam' is unknown; allowed: synthetic, replay",
        ),
        ("station: a\ncamera: {path: x}\nmodel: x\n", "camera: missing key driver"),
        ("station: a\n", "FILE:1: camera: missing; it must be given"),
        ("station: a\ncamera: 7\n", "FILE:2: camera"),
        ("? [a, b]\n: 1\n", "FILE:1: : a key must be plain text"),
        ("station: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("verdict:\n  deadline_ms: 0300\n", "FILE:2: verdict.deadline_ms: YAML takes 0300 for a number in base 8"),
        ("verdict: {deadline_ms: 1:30}\n", "YAML takes 1:30 for a number in base 8 or 60"),
        ("camera: {serial: 01234567}\n", "or in quotes where it is text"),
        ("station: a\x07b\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("station: a\nmodel: " + "m" * 5000 + "\n", "FILE:2: model: "),
    ],
)
def test_broken_files(text, message, tmp_path):
    assert message in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (None, "threshold", float("nan"), "threshold: input should be a finite number"),
        (None, "threads", 0, "threads: input should be greater than or equal to 1"),
        (None, "threshold", True, "threshold: input should be a number (given: yes, on or true)"),
        ("verdict", "deadline_ms", True, "verdict.deadline_ms: input should be a number (given: yes, on or true)"),
        ("plausible", "frozen_frames", False, "plausible.frozen_frames: input should be a number (given: no, off"),
        ("journal", "keep_days", float("inf"), "journal.keep_days: input should be a finite number"),
        ("journal", "keep_days", 1e6, "journal.keep_days: input should be less than or equal to 36500"),
        (
            "journal",
            "keep_dayz",
            1,
            "journal.keep_dayz: unknown key; allowed here: keep_days, max_mib, path, wait_ms",
        ),
        ("supervision", "hang_s", float("inf"), "supervision.hang_s: input should be a finite number"),
        (None, "device", {"cuda": 0}, "device: input should be 'auto', 'cpu' or 'cuda'"),
        (None, "on_overload", {"wait": 1}, "on_overload: input should be 'wait' or 'invalid'"),
        ("images", "format", {"png": 1}, "images.format: input should be 'png' or 'jpeg'"),
        (None, "journal", 5, "journal: input should be"),
        (None, "device", "gpu", "device: input should be 'auto', 'cpu' or 'cuda' (given: 'gpu')"),
        (None, "slots", "many", "slots: input should be a valid integer"),
        (None, "on_overload", "drop", "on_overload: input should be 'wait' or 'invalid'"),
        ("publish", "verdicts", "udp://127.0.0.1:1", "is not an endpoint"),
        ("publish", "verdicts", [], "publish.verdicts"),
        ("publish", "maps", "tcp://127.0.0.1:5550", "publish: tcp://127.0.0.1:5550 is given twice"),
        ("control", "endpoints", "tcp://127.0.0.1:5550", "control: tcp://127.0.0.1:5550 is given twice"),
        ("control", "endpoints", ["ipc:///tmp/a", "ipc:///tmp/a"], "control: ipc:///tmp/a is given twice"),
        ("control", "endpoints", "tcp://*:5550", "meet (* is every address); give each a port of its own"),
        ("control", "endpoints", "ipc:///tmp/" + 60 * "é", "is not an endpoint"),
        ("plausible", "frozen_frames", 1, "plausible.frozen_frames: 0 (off) or at least 2"),
        ("camera", "pixel_format", "YUV", "camera.pixel_format: input should be 'Mono8', 'Mono10'"),
    ],
)
def test_impossible_values_name_what_is_allowed(good, tmp_path, section, key, value, message):
    (good.setdefault(section, {}) if section else good)[key] = value
    told = complaint(tmp_path, good)
    assert message in told
    assert "literal" not in told, "nobody wrote that"
    assert "False" not in told


def test_on_is_a_section_with_its_defaults(good, tmp_path):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good))
    plain = load_config(path)
    path.write_text(yaml.safe_dump({**good, "journal": True, "images": True}))
    assert load_config(path) == plain


def test_a_client_on_this_machine_takes_an_address_that_can_be_connected_to(good, tmp_path):
    path = tmp_path / "station.yaml"

    def address(*endpoints, with_keys=False):
        path.write_text(yaml.safe_dump({**good, "control": {"endpoints": list(endpoints)}}))
        return load_addresses(path).control_address(with_keys=with_keys)

    assert address("tcp://*:5553") == "tcp://127.0.0.1:5553"
    assert address("ipc:///tmp/c.sock", "tcp://*:5553") == "ipc:///tmp/c.sock"
    assert address("tcp://*:5553", "ipc:///tmp/c.sock") == "ipc:///tmp/c.sock", "no key is needed there"
    assert address("ipc:///tmp/c.sock", "tcp://*:5553", with_keys=True) == "tcp://127.0.0.1:5553"
    assert address("ipc:///tmp/c.sock", with_keys=True) == "ipc:///tmp/c.sock"


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EIO, 1), (errno.ESTALE, 1), (errno.EACCES, 2), (errno.ENOENT, 2)]
)
def test_a_disk_that_may_be_well_again_is_worth_another_start(good, tmp_path, monkeypatch, number, code):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good))
    read = Path.read_bytes

    def ill(self):
        if self.suffix == ".safetensors":
            raise OSError(number, os.strerror(number), str(self))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", ill)
    with pytest.raises(typer.Exit) as ending, clear_errors():
        read_bundle(load_config(path).model)
    assert ending.value.exit_code == code


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_does_not_say_whether_there_is_a_bundle_is_no_mistake_in_the_file(
    good, tmp_path, monkeypatch, number
):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good))
    look = os.stat

    def ill(what, *arguments, **options):
        if str(what).endswith("bundle.json"):
            raise OSError(number, os.strerror(number), str(what))
        return look(what, *arguments, **options)

    monkeypatch.setattr(os, "stat", ill)  # what Path.stat goes through, and is_file as well
    assert str(load_config(path).model) == good["model"], "reading it says what is wrong"


def test_a_file_that_is_only_searched_for_addresses_may_hold_anything_else(good, tmp_path):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good) + "on: 5\n1: yes\n")
    assert load_addresses(path).station == "bench"


def test_options_of_one_driver_are_listed_when_another_ones_are_used(good, tmp_path):
    good["camera"] = {"driver": "pylon", "path": "x"}
    text = complaint(tmp_path, good)
    assert "camera.path: unknown key; allowed here: driver, exposure_us, features, frames, gain" in text


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"station: caf\xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_state_folder_follows_systemd_then_xdg_then_home(good, tmp_path, monkeypatch):
    path = tmp_path / "station.yaml"
    path.write_text(yaml.safe_dump(good))
    config = load_config(path)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert config.state_folder() == Path("/x/inspectord/bench")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/inspectord")
    assert config.state_folder() == Path("/var/lib/inspectord/bench")
    good["state_dir"] = "/mine"
    path.write_text(yaml.safe_dump(good))
    assert load_config(path).state_folder() == Path("/mine/bench")


def test_every_error_with_an_exit_code_exists():
    import importlib

    from daemon.cli_errors import EXIT_CODES

    for name in EXIT_CODES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), BaseException)


def test_commands_beside_the_line_do_not_import_the_networks():
    import subprocess
    import sys

    code = "import sys, daemon.cli, daemon.addresses, daemon.client, daemon.keys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
