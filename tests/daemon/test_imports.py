from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_NETWORKS = """
import sys
sys.modules.update(dict.fromkeys(("torch", "openvino", "sklearn", "scipy", "matplotlib")))  # None: importing fails
"""


@pytest.mark.parametrize("name", ["cli", "client", "watch", "journal", "addresses"])
def test_what_only_reads_loads_no_networks(name):
    """`watch`, `verdicts` and `ctl` are typed often, and torch alone takes seconds on a small PC."""
    subprocess.run([sys.executable, "-c", f"{WITHOUT_NETWORKS}import daemon.{name}"], check=True)


@pytest.mark.parametrize(
    "typed",
    [
        "train good -o model --preset fast",
        "train good -o model --image-size 250x250",
        "evaluate model good --device tpu",
        "bench engine --frame 1x1",
        "bench pipeline --camera-size 5",
        "bench ingest --camera-size 5",
        "bench scaling --image-size 5",
        "bench train --size huge",
    ],
)
def test_a_wrong_option_is_said_before_networks_are_loaded(typed):
    code = f"{WITHOUT_NETWORKS}from daemon.cli import main\nsys.argv = {['inspectord', *typed.split()]!r}\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert any(word in done.stderr for word in ("Invalid value", "not a multiple of 4"))
