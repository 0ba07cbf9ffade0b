from __future__ import annotations

import pytest

from tests.system.line import Line


@pytest.fixture
def line(tmp_path_factory, tiny_bundle):
    lines = []

    def make(camera, **config):
        folder = tmp_path_factory.mktemp("line")  # short: a socket's path may have 107 characters
        lines.append(Line(folder, {"camera": camera, "model": str(tiny_bundle), **config}))
        return lines[-1]

    yield make
    for made in lines:
        made.close()
