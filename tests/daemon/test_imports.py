from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("name", ["cli", "client", "watch", "journal", "addresses"])
def test_what_only_reads_loads_no_networks(name):
    """`watch`, `verdicts` and `ctl` are typed often, and torch alone takes seconds on a small PC."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("torch", "openvino", "sklearn", "scipy", "matplotlib")))  # None: importing fails
import daemon.{name}
"""
    subprocess.run([sys.executable, "-c", code], check=True)
