"""`inspectord demo`: the whole job on the simulated line, without hardware or network."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import cv2
import msgspec
import numpy as np
import typer
import yaml
import zmq

from calibrate.options import LossOptions, TrainOptions
from calibrate.train import train
from daemon.messages import MapMessage, VerdictMessage
from daemon.picture import PictureRow, save_picture
from daemon.ports import free_ports
from daemon.progress import ConsoleListener
from daemon.watch import verdict_line
from drivers.synthetic import PartRenderer, SyntheticOptions
from pipeline.bundle import is_bundle
from pipeline.geometry import Geometry
from pipeline.preprocess import PreprocessSpec

_GOOD_PARTS = 120
_PHOTOGRAPHED_STEP = 7
"""Every seventh part, so that the photographs cover the lamp's slow swing."""
_IMAGE_PX = 128
"""A quarter of the default's pixels: trains in a minute or two on two cores."""
_SEED = 7
_FIRST_INSPECTED = 1180
"""Index of the first inspected part: none of them was trained on."""
_RATE_FPS = 5.0
_PICTURE_ROWS = 7


class DemoFailed(Exception):
    """The demo's daemon did not do its job; the message says where its log is."""


@dataclass(frozen=True, slots=True)
class _Received:
    verdicts: list[VerdictMessage]
    maps: dict[int, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


def run_demo(folder: Path, parts: int, steps: int) -> None:
    """Train on the simulated line, run the daemon on it, watch it, and save a picture. Raises DemoFailed."""
    model = folder / "model"
    if is_bundle(model):
        typer.echo(f"using the model that an earlier demo trained: {model}")
    else:
        _photograph_good_parts(folder / "good")
        options = TrainOptions(
            dataset=folder / "good",
            out=model,
            geometry=Geometry(_IMAGE_PX, _IMAGE_PX),
            preprocess=PreprocessSpec(_IMAGE_PX, _IMAGE_PX),
            steps=steps,
            held_out_share=0.25,
            # Bolder than the paper, which has 70,000 steps to spend where the demo has a few hundred.
            learning_rate=1e-3,
            losses=LossOptions(hard_quantile=0.9),
        )
        with ConsoleListener() as listener:
            train(options, listener)
    config = _write_config(folder, model, parts)
    typer.echo(f"\nrunning: inspectord run -c {config}\n")
    received = _run_and_watch(folder, config, parts)
    _report(received, folder)


def _line(defect_rate: float) -> SyntheticOptions:
    return SyntheticOptions(seed=_SEED, defect_rate=defect_rate)


def _photograph_good_parts(folder: Path) -> None:
    typer.echo(f"photographing {_GOOD_PARTS} good parts of the simulated line into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    renderer = PartRenderer(_line(0.0))
    for index in range(_GOOD_PARTS):
        cv2.imwrite(str(folder / f"good_{index:03d}.png"), renderer.render(index * _PHOTOGRAPHED_STEP).raw)


def _write_config(folder: Path, model: Path, parts: int) -> Path:
    verdict_port, map_port = free_ports(2)
    config = {
        "station": "demo",
        "camera": {
            "driver": "synthetic",
            "seed": _SEED,
            "first_index": _FIRST_INSPECTED,
            "frames": parts,
            "rate_fps": _RATE_FPS,
            "defect_rate": 0.4,
        },
        "model": str(model),
        "publish": {
            "verdicts": f"tcp://127.0.0.1:{verdict_port}",
            "maps": f"tcp://127.0.0.1:{map_port}",
        },
        "state_dir": str(folder / "state"),
    }
    path = folder / "station.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _run_and_watch(folder: Path, config: Path, parts: int) -> _Received:
    endpoints = yaml.safe_load(config.read_text())["publish"]
    log = folder / "daemon.log"
    received = _Received([], {})
    with (
        zmq.Context() as context,
        context.socket(zmq.SUB) as subscriber,
        log.open("w") as log_file,
    ):
        subscriber.setsockopt(zmq.LINGER, 0)
        # Connected before the daemon starts: a PUB socket sends nothing again to those who come late.
        for endpoint in (endpoints["verdicts"], endpoints["maps"]):
            subscriber.connect(endpoint)
        subscriber.subscribe(b"verdict/demo/")
        subscriber.subscribe(b"map/demo/")
        daemon = subprocess.Popen(
            [sys.executable, "-m", "daemon.cli", "run", "-c", str(config)],
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
        )
        output: list[str] = []
        reader = threading.Thread(target=lambda: output.append(daemon.communicate()[0]))
        reader.start()
        try:
            while len(received.verdicts) < parts and (reader.is_alive() or subscriber.poll(0)):
                if subscriber.poll(200):
                    _sort_in(subscriber.recv_multipart(), received)
        except KeyboardInterrupt:
            daemon.terminate()
            raise
        finally:
            reader.join()
        while len(received.maps) < len(received.verdicts) and subscriber.poll(200):
            _sort_in(subscriber.recv_multipart(), received)
    if daemon.returncode != 0 or len(received.verdicts) < parts:
        raise DemoFailed(
            f"the daemon ended with code {daemon.returncode} after {len(received.verdicts)} of {parts} verdicts; "
            f"its log: {log}"
        )
    typer.echo("\n" + "".join(output))
    return received


def _sort_in(message: list[bytes], received: _Received) -> None:
    if message[0].startswith(b"verdict/"):
        verdict = msgspec.json.decode(message[1], type=VerdictMessage)
        received.verdicts.append(verdict)
        typer.echo(verdict_line(verdict))
    else:
        described = msgspec.json.decode(message[1], type=MapMessage)
        values = np.frombuffer(message[2], described.dtype).reshape(described.shape)
        received.maps[described.sequence] = values.astype(np.float32)


def _report(received: _Received, folder: Path) -> None:
    truth = {v.sequence: v.source.split("/")[0] for v in received.verdicts}
    scores: dict[str, list[float]] = {}
    for v in received.verdicts:
        if v.score is not None:
            scores.setdefault(truth[v.sequence], []).append(v.score)
    typer.echo(f"{'truth':<14}{'parts':>6}{'lowest score':>14}{'highest':>10}   threshold "
               f"{received.verdicts[0].threshold:.3f}")  # fmt: skip
    for kind in sorted(scores, key=lambda k: (k != "good", k)):
        typer.echo(f"{kind:<14}{len(scores[kind]):>6}{min(scores[kind]):>14.3f}{max(scores[kind]):>10.3f}")
    missed = sum(truth[v.sequence] != "good" and v.verdict == "OK" for v in received.verdicts)
    false = sum(truth[v.sequence] == "good" and v.verdict != "OK" for v in received.verdicts)
    typer.echo(f"{missed} defective parts passed, {false} good parts rejected, of {len(received.verdicts)}")

    chosen: dict[str, VerdictMessage] = {}
    for v in received.verdicts:
        if v.sequence in received.maps:
            chosen.setdefault(truth[v.sequence], v)
    renderer = PartRenderer(_line(0.4))
    rows = []
    for kind, verdict in sorted(chosen.items(), key=lambda item: item[0] != "good")[:_PICTURE_ROWS]:
        part = renderer.render(int(verdict.source.split("/")[1]))
        rows.append(PictureRow(part.rgb, part.mask, received.maps[verdict.sequence], kind, verdict))
    picture = folder / "demo.png"
    save_picture(rows, picture)
    typer.echo(f"parts, maps and verdicts side by side: {picture.absolute()}")
