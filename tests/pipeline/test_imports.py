from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "pydantic",
    "structlog",
    "zmq",
    "pypylon",
    "msgspec",
    "natsort",
    "typer",
    "rich",
    "matplotlib",
    "sklearn",
    "cupy",
    "openvino",
    "torch",
)


def test_pipeline_needs_nothing_but_numpy_opencv_and_safetensors():
    code = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY!r}))  # None: importing it fails
import pipeline.engines, pipeline.inspect, pipeline.preprocess_cuda
"""
    subprocess.run([sys.executable, "-c", code], check=True)
