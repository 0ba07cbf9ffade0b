from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

from calibrate.checkpoint import FILE
from pipeline.bundle import read_bundle, write_bundle
from pipeline.engine_cpu import cpu_precisions
from tests.system.line import PATIENCE_S, REPOSITORY, free_port
from tests.system.test_run import SYNTHETIC


def inspectord(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "daemon.cli", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        **options,
    )


@pytest.fixture
def config(tmp_path, tiny_bundle):
    def write(**changes):
        endpoints = {"verdicts": f"tcp://127.0.0.1:{free_port()}"}
        content = {"station": "cli", "camera": SYNTHETIC, "model": str(tiny_bundle), "publish": endpoints}
        path = tmp_path / "station.yaml"
        path.write_text(yaml.safe_dump({**content, "state_dir": str(tmp_path / "state"), **changes}))
        return path

    return write


def test_a_broken_configuration_is_exit_code_2_with_every_line(config):
    path = config(camera={"driver": "replay", "path": "/nowhere", "speed": 3}, slots=1)
    for command in ("run", "check"):
        done = inspectord(command, "-c", path)
        assert done.returncode == 2
        assert "camera.path: nothing there: /nowhere" in done.stderr
        assert "camera.speed: unknown key; allowed here" in done.stderr
        assert "slots: input should be greater than or equal to 3" in done.stderr
        assert "Traceback" not in done.stderr


def test_check_opens_everything_and_says_what_it_found(config):
    done = inspectord("check", "-c", config())
    assert done.returncode == 0, done.stderr
    words = [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith("precision")]
    assert words == ["configuration", "bundle", "engine", "camera", "frame", "speed", "threshold", "verdict"]
    assert "input 64x64 px, map 8x8" in done.stdout
    assert "96x96 px, BGR8" in done.stdout


def test_check_refuses_a_deadline_that_the_engine_cannot_meet(config):
    done = inspectord("check", "-c", config(verdict={"deadline_ms": 0.1}))
    assert done.returncode == 1
    assert "verdict.deadline_ms is 0.1: every part would be INVALID/deadline" in done.stderr
    assert "--size small" in done.stderr


@pytest.mark.parametrize("trigger", ["software", "command"])
def test_check_fires_the_trigger_where_that_is_ours(config, trigger):
    pytest.importorskip("pypylon", reason="pypylon is not installed")
    camera = {"driver": "pylon", "serial": "0815-0000", "width": 96, "height": 96, "pixel_format": "BGR8"}
    done = inspectord("check", "-c", config(camera={**camera, "trigger": trigger}, plausible={"black_below": 0}))
    assert done.returncode == 0, done.stderr
    assert "frame: 0815-0000, 96x96 px, BGR8, complete" in done.stdout


def test_photographs_of_a_bayer_camera_are_learnt_from_as_such(tmp_path, config):
    camera = {"driver": "synthetic", "width": 96, "height": 96, "pixel_format": "BayerRG8", "defect_rate": 0}
    path = tmp_path / "camera.yaml"
    path.write_text(yaml.safe_dump({"camera": camera}))  # no bundle yet
    done = inspectord("grab", "-c", path, 8, "-o", tmp_path / "good")
    assert done.returncode == 0, done.stderr
    path.write_text(yaml.safe_dump({"camera": {**camera, "first_index": 8}}))
    done = inspectord("grab", "-c", path, 4, "-o", tmp_path / "good")
    assert "4 photographs in" in done.stdout
    assert [p.name for p in sorted((tmp_path / "good").glob("*.png"))] == [f"{n:06d}.png" for n in range(1, 13)]
    done = inspectord("train", tmp_path / "good", "-o", tmp_path / "bundle", "--steps", 2, *TRAIN)
    assert done.returncode == 0, done.stderr
    bundle = read_bundle(tmp_path / "bundle")
    assert bundle.training["pixel_formats"] == ["BayerRG8"]
    grey = {**camera, "pixel_format": "Mono8"}
    assert inspectord("check", "-c", config(model=str(tmp_path / "bundle"), camera=camera)).returncode == 0
    done = inspectord("check", "-c", config(model=str(tmp_path / "bundle"), camera=grey))
    assert done.returncode == 1
    assert "INVALID/format: the bundle was trained on BayerRG8, this is Mono8" in done.stderr


def test_photographing_ends_with_a_clear_error_where_the_source_does(tmp_path):
    path = tmp_path / "camera.yaml"
    path.write_text(yaml.safe_dump({"camera": {"driver": "synthetic", "frames": 3}}))
    done = inspectord("grab", "-c", path, 5, "-o", tmp_path / "good")
    assert (done.returncode, len(list((tmp_path / "good").glob("*.png")))) == (1, 3)
    assert "the source ended 2 photographs too early" in done.stderr
    path.write_text("station: line1\n")
    done = inspectord("grab", "-c", path, 5, "-o", tmp_path / "good")
    assert done.returncode == 2
    assert "camera" in done.stderr


@pytest.mark.skipif("int8" not in cpu_precisions(), reason="this processor has no int8")
def test_check_refuses_a_precision_that_differs_on_this_machine(config, tiny_bundle, tmp_path):
    bundle = read_bundle(tiny_bundle)
    elsewhere = {name: largest / 50 for name, largest in bundle.model.ranges.items()}
    write_bundle(replace(bundle, model=replace(bundle.model, ranges=elsewhere)), tmp_path / "b")
    done = inspectord("check", "-c", config(model=str(tmp_path / "b"), precision="int8"))
    assert done.returncode == 1
    assert "precision int8: scores differ from float32's by" in done.stderr
    assert "set precision: fp32" in done.stderr


def test_check_says_what_is_wrong_with_the_camera(config):
    pytest.importorskip("pypylon", reason="pypylon is not installed")
    done = inspectord("check", "-c", config(camera={"driver": "pylon", "serial": "42"}))
    assert done.returncode == 1
    assert "no camera with serial '42'; connected: Emulation 0815-0000" in done.stderr


def test_cuda_without_cuda_is_wrong_where_it_cannot_come(config):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = inspectord("run", "-c", config(device="cuda"))
    # With a build for GPUs the device may come later, and systemd tries again.
    assert done.returncode == (2 if torch.version.cuda is None else 1)
    assert "device: cuda was asked for, but PyTorch finds no CUDA device" in done.stderr


def test_watch_prints_verdicts_as_they_come(config):
    path = config(camera={**SYNTHETIC, "rate_fps": 20})
    endpoint = yaml.safe_load(path.read_text())["publish"]["verdicts"]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", "run", "-c", str(path)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        done = inspectord("watch", endpoint, "--count", 3, "--station", "cli")
    finally:
        daemon.terminate()
        daemon.wait(PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert all(line.startswith("cli ") and "score" in line for line in done.stdout.splitlines())


def test_watch_refuses_what_is_no_endpoint():
    done = inspectord("watch", "localhost")
    assert done.returncode == 1
    assert "cannot connect to localhost" in done.stderr


TRAIN = ("--image-size", "64x64", "--precision", "fp32", "--held-out", 0.25)


@contextlib.contextmanager
def training(out, command, **streams):
    """A training that has written its first checkpoint; killed at the end, whatever the test finds."""
    with subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", *map(str, command)], cwd=REPOSITORY, text=True, **streams
    ) as process:
        try:
            deadline_s = time.monotonic() + PATIENCE_S
            while not (out / FILE).exists():
                assert process.poll() is None
                assert time.monotonic() < deadline_s
                os.sched_yield()
            yield process
        finally:
            process.kill()


def test_training_goes_on_after_kill_9_and_says_so(good_parts, tmp_path):
    out = tmp_path / "model"
    command = ("train", good_parts, "-o", out, "--steps", 40, "--checkpoint-s", 0, *TRAIN)
    with training(out, command, stderr=subprocess.DEVNULL) as process:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (out / "bundle.json").exists()
    done = inspectord("train", good_parts, "-o", out, "--steps", 40, *TRAIN)
    assert done.returncode == 0, done.stderr
    assert "resuming from the checkpoint at step" in done.stderr
    assert (out / "bundle.json").exists()
    again = inspectord(*command)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_ctrl_c_leaves_a_checkpoint_and_exit_code_130(good_parts, tmp_path):
    out = tmp_path / "model"
    command = ("train", good_parts, "-o", out, "--steps", 100_000, "--checkpoint-s", 0, *TRAIN)
    with training(out, command, stderr=subprocess.PIPE) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
    assert "the same command goes on" in errors
    assert (out / FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "100"), "'100' is not like 512x512"),
        (("--image-size", "250x250"), "not a multiple of 4: take 248 or 252"),
        (("--tiles", "9x9"), "too many"),
        (("--padded", "--tiles", "2x2"), "tiles need the unpadded geometry"),
        (("--size", "large"), "not one of small, medium"),
        (("--ignore-mask", "/no/mask.png"), "/no/mask.png: No such file or directory"),
        (("--natural", "/no/folder"), "no natural images there"),
        (("--roi", "0,0,5000,5000"), "reaches beyond the frame"),
    ],
)
def test_impossible_training_is_refused_at_once(good_parts, tmp_path, arguments, message):
    done = inspectord("train", good_parts, "-o", tmp_path / "model", "--steps", 1, *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_demo_runs_from_nothing_to_a_picture(tmp_path):
    done = inspectord("demo", "--folder", tmp_path / "demo", "--parts", 8, "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("score") >= 8
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    config = tmp_path / "demo" / "station.yaml"
    assert inspectord("check", "-c", config).returncode == 0, "the demo's configuration can be used again"


def test_version():
    assert inspectord("--version").stdout.startswith("inspectord ")
