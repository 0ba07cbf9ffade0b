from __future__ import annotations

import os
import signal

import pytest

from calibrate.listener import TrainingStopped
from daemon import progress
from daemon.progress import ConsoleListener


def test_where_there_is_no_terminal_lines_tell_how_long_it_takes(monkeypatch, capsys):
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with ConsoleListener("working") as listener:
        for done in (1, 2, 3):
            now_s = 60.0 * done
            listener.step(done, 4, {"loss": 0.25})
        for done in (1, 2):  # something else, of another length
            now_s += 20.0
            listener.step(done, 1000, {})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "working 2/4 0:02:00 left loss 0.250"
    assert lines[2] == "working 3/4 0:01:00 left loss 0.250"
    assert lines[3] == "working 1/1000"
    assert lines[4] == "working 2/1000 5:32:40 left"


def test_ctrl_c_asks_to_stop_and_the_second_one_insists(capsys):
    before = signal.getsignal(signal.SIGINT)
    with ConsoleListener() as listener:
        listener.go_on("nowhere")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(TrainingStopped, match="stopped while testing"):
            listener.go_on("while testing")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
