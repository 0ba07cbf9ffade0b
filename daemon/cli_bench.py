"""The `inspectord bench` commands: comparisons made in one run, with ratios."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli_errors import clear_errors
from daemon.cli_options import check_json_file, numbers, one_of

_DRAWN_PARTS = 24


def register(app: typer.Typer) -> None:
    """Add the commands."""
    bench = typer.Typer(help="Compare speeds in one run and print ratios.", no_args_is_help=True)
    bench.command()(train)
    bench.command()(soak)
    app.add_typer(bench, name="bench")


def train(
    dataset: Annotated[Path | None, typer.Argument(help="good images; none: parts of the simulated line")] = None,
    size: Annotated[str, typer.Option(help="small or medium")] = "small",
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the network's input, px")] = "256x256",
    steps: Annotated[int, typer.Option(min=1, help="steps a side in each of five rounds")] = 8,
    precision: Annotated[str, typer.Option(help="of inspectord's side: auto, fp32 or bf16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Compare training steps per second with a straightforward implementation of the published recipe."""
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        from calibrate.bench_train import bench_train
        from calibrate.options import TrainOptions
        from daemon.progress import ConsoleListener
        from pipeline.bundle import write_atomically
        from pipeline.geometry import Geometry
        from pipeline.preprocess import PreprocessSpec

        check_json_file(json_file)
        width, height = numbers(image_size, r"(\d+)x(\d+)", "--image-size", "512x512")
        if dataset is None:
            dataset = _draw_parts(Path(folder))
        options = TrainOptions(
            dataset=dataset,
            out=Path(folder),
            size=one_of(size, "--size", "small", "medium"),  # type: ignore[arg-type]
            geometry=Geometry(width, height),
            preprocess=PreprocessSpec(width, height),
            precision=one_of(precision, "--precision", "auto", "fp32", "bf16"),  # type: ignore[arg-type]
            device=one_of(device, "--device", "auto", "cpu", "cuda"),  # type: ignore[arg-type]
        )
        with ConsoleListener("rounds") as listener:
            found = bench_train(options, steps, lambda done, total: listener.step(done, total, {}))
        if json_file is not None:
            write_atomically(json_file, (json.dumps(found, indent=2) + "\n").encode())
    typer.echo("  ".join(f"{name} {value}" for name, value in found["machine"].items() if value))
    typer.echo(
        f"{'side':<14}{'precision':<11}{'steps/s':>9}{'slowest':>9}{'fastest':>9}{'ratio':>8}{'mean loss':>11}"
    )
    for side in found["results"]:
        typer.echo(
            f"{side['side']:<14}{side['precision']:<11}{side['steps_per_s']:>9.2f}{side['slowest_steps_per_s']:>9.2f}"
            f"{side['fastest_steps_per_s']:>9.2f}{side['ratio_to_reference']:>8.2f}{side['mean_loss']:>11.4f}"
        )


def soak(
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="how long; default 2 where --frames is not given")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="or until so many verdicts")] = None,
    model: Annotated[
        Path | None, typer.Option(help="bundle; none: a tiny one made on the spot", file_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="of the order of the faults")] = 0,
    pause_s: Annotated[float, typer.Option(min=0, help="mean pause between two faults")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Run a station on the simulated line, inject every fault there is, and count what a subscriber missed."""
    from daemon.soak import SoakFailed, SoakLine
    from daemon.soak import soak as run_soak
    from pipeline.bundle import write_atomically

    check_json_file(json_file)
    if minutes is None and frames is None:
        minutes = 2.0
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        line = SoakLine(Path(folder) / "line", model or _tiny_model(Path(folder)))
        try:
            for name, so_far in run_soak(line, minutes, frames, seed, pause_s):
                took_ms = so_far.recovery_ms[name][-1]
                typer.echo(f"{so_far.last_sequence:>9}  {name:<26} judged again after {took_ms:8.0f} ms")
        except SoakFailed:
            typer.echo((line.folder / "daemon.log").read_text()[-4000:], err=True)
            raise
        finally:
            line.close()
        found = line.result.to_json()
        if json_file is not None:
            write_atomically(json_file, (json.dumps(found, indent=2) + "\n").encode())
    typer.echo(str(line.result))


def _tiny_model(folder: Path) -> Path:
    """Train a bundle for a few steps: quick to run, good for nothing else."""
    from calibrate.options import TrainOptions
    from calibrate.train import train as train_bundle
    from pipeline.geometry import Geometry
    from pipeline.preprocess import PreprocessSpec

    good, model = folder / "good", folder / "model"
    good.mkdir()
    options = TrainOptions(
        dataset=_draw_parts(good), out=model, geometry=Geometry(64, 64), preprocess=PreprocessSpec(64, 64), steps=4
    )
    train_bundle(options)
    return model


def _draw_parts(folder: Path) -> Path:
    import cv2

    from drivers.synthetic import PartRenderer, SyntheticOptions

    renderer = PartRenderer(SyntheticOptions(defect_rate=0))
    for index in range(_DRAWN_PARTS):
        cv2.imwrite(str(folder / f"good_{index}.png"), renderer.render(index).raw)
    return folder
