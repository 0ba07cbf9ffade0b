from __future__ import annotations

import threading
from pathlib import Path

import pytest

from daemon.commands import Commands
from daemon.replies import Capture
from daemon.serving import Refused


def test_captures_on_a_disk_that_hangs_do_not_add_up():
    let_go = threading.Event()

    class HungArchive:
        capture_progress = None

        def capture(self, count, name):
            let_go.wait(60)
            return Path(name)

    commands = Commands(None, None, HungArchive(), None, None)
    first = commands.carry_out(Capture(count=1, name="first"))
    with pytest.raises(Refused, match="another capture is being begun"):
        commands.carry_out(Capture(count=1, name="second"))
    let_go.set()
    assert first.result(60).result["folder"] == "first"
    assert commands.carry_out(Capture(count=1, name="third")).result(60).result["folder"] == "third"
