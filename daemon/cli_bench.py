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


def _draw_parts(folder: Path) -> Path:
    import cv2

    from drivers.synthetic import PartRenderer, SyntheticOptions

    renderer = PartRenderer(SyntheticOptions(defect_rate=0))
    for index in range(_DRAWN_PARTS):
        cv2.imwrite(str(folder / f"good_{index}.png"), renderer.render(index).raw)
    return folder
