from __future__ import annotations

import pytest

from tests.system.line import Line


@pytest.fixture
def line(tmp_path, tiny_bundle):
    lines = []

    def make(camera, **config):
        folder = tmp_path / f"line{len(lines)}"
        folder.mkdir()
        lines.append(Line(folder, {"camera": camera, "model": str(tiny_bundle), **config}))
        return lines[-1]

    yield make
    for made in lines:
        made.close()
