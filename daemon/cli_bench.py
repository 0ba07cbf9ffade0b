"""The `inspectord bench` commands: comparisons made in one run, with ratios."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from daemon.bench_output import Bars, Files, show
from daemon.cli_errors import clear_errors
from daemon.cli_options import DeviceOption, EnginePrecisionOption, engine_words, format_named, one_of, pair

_DRAWN_PARTS = 24
_SIZES = ("small", "medium")

JsonOption = Annotated[Path | None, typer.Option("--json", help="write the results to this file")]
PlotOption = Annotated[Path | None, typer.Option(help="draw a summary into this PNG")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, max=256, help="of the CPU engine; none: all cores")]
FrameFormatOption = Annotated[str, typer.Option("--pixel-format", help="such as BayerRG8, Mono8, BGR8")]
ModelOption = Annotated[
    Path | None,
    typer.Option(help="bundle; none: one trained for a few steps on the spot", file_okay=False, exists=True),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    bench = typer.Typer(help="Compare speeds in one run and print ratios.", no_args_is_help=True)
    for command in (engine, pipeline, ingest, scaling, train, soak):
        bench.command()(command)
    app.add_typer(bench, name="bench")


def engine(
    size: Annotated[list[str] | None, typer.Option(help="small, medium; repeatable; none: both")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the network's input, px")] = "256x256",
    tiles: Annotated[str, typer.Option(help="ROWSxCOLUMNS of pieces")] = "1x1",
    frame: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT: our engines begin with such a frame, not with a prepared image"),
    ] = None,
    pixel_format: Annotated[str | None, typer.Option(help="of that frame, such as Mono8; none: BayerRG8")] = None,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="for each engine; at least 3 runs in each of 10 turns")
    ] = 10.0,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time the engines beside the published implementation in eager PyTorch, from prepared image to raw maps.

    With --frame ours do more than that: they begin with the camera's frame, and are saturated with it, too.
    """
    with clear_errors():
        from pipeline.engines import resolve_device
        from pipeline.geometry import Geometry

        files = Files.checked(json_file, plot)
        sizes = [one_of(each, "--size", *_SIZES) for each in size or _SIZES]
        one_of(device, "--device", "cpu", "cuda")
        width, height = pair(image_size, "--image-size", "512x512")
        rows, columns = pair(tiles, "--tiles", "2x2")
        geometry = Geometry(width, height, tile_rows=rows, tile_columns=columns)
        if pixel_format is not None and frame is None:
            raise typer.BadParameter("is that of a --frame", param_hint="--pixel-format")
        fmt = format_named(pixel_format or "BayerRG8")
        frame_px = None if frame is None else pair(frame, "--frame", "2448x2048")
        if frame_px is not None and min(frame_px) < 3:
            raise typer.BadParameter("sides of at least 3 px", param_hint="--frame")
        on_cuda, _ = resolve_device(device)  # type: ignore[arg-type]
        # Only now: PyTorch takes seconds to load, and a wrong option should be said at once.
        from daemon.bench_engine import FrameOf, Side, bench_engine
        from daemon.progress import ConsoleListener

        if on_cuda:
            precisions = ["fp32", "fp16"]
        else:
            from pipeline.engine_cpu import cpu_precisions

            precisions = list(cpu_precisions())
        taken = None if frame_px is None else FrameOf(*frame_px, fmt)
        sides = []
        for each in sizes:
            engines = [("reference", "fp32"), *(("cuda" if on_cuda else "cpu", other) for other in precisions)]
            sides += [
                Side(name, precision, each, geometry, threads, device, taken)  # type: ignore[arg-type]
                for name, precision in engines
            ]
        with ConsoleListener("rounds") as listener:

            def on_round(done: int, total: int) -> None:
                listener.step(done, total, {})
                listener.go_on(f"after round {done} of {total}")

            found = bench_engine(sides, seconds, on_round)
        columns_shown = [
            ("engine", ""), ("precision", ""), ("size", ""), ("image_size", ""), ("median_ms", ".2f"),
            ("p10_ms", ".2f"), ("p90_ms", ".2f"), ("p99_ms", ".2f"), ("saturated_fps", ".1f"),
            ("ratio_to_reference", ".2f"), ("limit_ms", ".2f"), ("peak_memory_mib", ".0f"), ("runs", "d"),
        ]  # fmt: skip
        names = list(dict.fromkeys(f"{r['engine']} {r['precision']}" for r in found["results"]))
        medians = {(f"{r['engine']} {r['precision']}", r["size"]): r["median_ms"] for r in found["results"]}
        series = {name: [medians[name, each] for each in sizes] for name in names}
        show(found, columns_shown, files, Bars("EfficientAD, one image", "median, ms", sizes, series))


def pipeline(
    model: ModelOption = None,
    camera_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the frames, px")] = "2448x2048",
    pixel_format: FrameFormatOption = "BayerRG8",
    load_fps: Annotated[
        list[float] | None,
        typer.Option(min=0.01, help="frames a second; repeatable; none: half of what saturates it"),
    ] = None,
    frames: Annotated[int, typer.Option(min=10, help="measured at each load, after a tenth more")] = 300,
    device: DeviceOption = "auto",
    precision: EnginePrecisionOption = "auto",
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Run a whole station, saturated and at given loads, and time each stage from frame to verdict."""
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        from pipeline.engines import reduced_precisions, resolve_device

        files = Files.checked(json_file, plot)
        width, height = pair(camera_size, "--camera-size", "2448x2048")
        camera = {
            "driver": "synthetic",
            "width": width,
            "height": height,
            "pixel_format": format_named(pixel_format).value,
        }
        if not (64 <= width <= 8192 and 64 <= height <= 8192):
            raise typer.BadParameter("sides of 64 to 8192 px", param_hint="--camera-size")
        if load_fps is not None and len(set(load_fps)) < len(load_fps):
            raise typer.BadParameter("a load is given twice", param_hint="--load-fps")
        chosen, _ = engine_words(device, precision)
        on_cuda, _ = resolve_device(chosen)
        if precision not in ("auto", "fp32", *reduced_precisions("cuda" if on_cuda else "cpu")):
            raise typer.BadParameter(f"this machine does not compute in {precision}", param_hint="--precision")
        config = {
            "camera": camera,
            "model": str(model or _quick_model(Path(folder), 256)),
            "device": "cuda" if on_cuda else "cpu",
            "precision": precision,
            **({} if threads is None else {"threads": threads}),
        }
        from daemon.bench_line import bench_pipeline

        found = bench_pipeline(Path(folder), config, load_fps, frames)
        show(found, _LINE_COLUMNS, files, _stage_bars("From frame to verdict", found["results"]))


def ingest(
    frames: Annotated[int, typer.Option(min=100, help="measured, after 300 more")] = 5000,
    camera_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the frames, px")] = "1920x1200",
    rounds: Annotated[int, typer.Option(min=1, help="at each load; medians are printed")] = 3,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Run a station on pylon's emulated camera with an engine that costs nothing: what all the rest costs."""
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        files = Files.checked(json_file, plot)
        width, height = pair(camera_size, "--camera-size", "1920x1200")
        from daemon.bench_line import bench_ingest, need_pylon

        need_pylon()
        found = bench_ingest(Path(folder), width, height, frames, rounds)
        show(found, [("with", ""), *_LINE_COLUMNS], files, _stage_bars("Without an engine", found["results"]))


def scaling(
    image_size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT of the network's input; repeatable; none: 256 to 1024")
    ] = None,
    stations: Annotated[int, typer.Option(min=0, max=16, help="on this machine at once, at most")] = 4,
    seconds: Annotated[float, typer.Option(min=0.1, help="for each image size")] = 5.0,
    frames: Annotated[int, typer.Option(min=10, help="of each station")] = 200,
    model: ModelOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time image sizes with and without tiles, and one to several stations on one machine."""
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        files = Files.checked(json_file, plot)
        pixels = [
            pair(each, "--image-size", "512x512") for each in image_size or ["256x256", "512x512", "1024x1024"]
        ]
        from daemon.bench_line import bench_scaling
        from pipeline.geometry import Geometry

        for width, height in pixels:
            for each in (1, 2):
                Geometry(width, height, tile_rows=each, tile_columns=each)  # impossible ones are said at once
        judged_by = str(model or _quick_model(Path(folder), 256)) if stations else ""
        found = bench_scaling(Path(folder), judged_by, pixels, stations, seconds, frames)
        by_size = [r for r in found["results"] if r["kind"] == "image_size"]
        labels = ["x".join(map(str, r["image_size"])) + (" tiled" if r["tiles"] != [1, 1] else "") for r in by_size]
        bars = Bars("EfficientAD-S by image size", "median, ms", labels, {"cpu": [r["median_ms"] for r in by_size]})
        columns = [
            ("kind", ""), ("precision", ""), ("image_size", ""), ("tiles", ""), ("median_ms", ".1f"),
            ("peak_memory_mib", ".0f"), ("stations", "d"), ("threads", "d"), ("rate_fps", ".1f"),
            ("total.p50_ms", ".1f"), ("total.p99_ms", ".1f"),
        ]  # fmt: skip
        show(found, columns, files, bars)


_LINE_COLUMNS = [
    ("load_fps", ".1f"), ("saturated", ""), ("precision", ""), ("rate_fps", ".1f"), ("invalid", "d"),
    *((f"{stage}.p50_ms", ".2f") for stage in ("grab", "queue", "preprocess", "infer", "publish", "overhead")),
    *((f"total.{key}", ".2f") for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")),
    ("rss_mib", ".0f"), ("descriptors", "d"),
]  # fmt: skip


def _stage_bars(title: str, results: list[dict[str, Any]]) -> Bars:
    stages = ["grab", "queue", "preprocess", "infer", "publish", "total"]
    series = {}
    for result in results:
        load = "saturated" if result["saturated"] else f"{result['load_fps']:.3g} frames/s"
        series[result.get("with", load)] = [result[stage]["p50_ms"] for stage in stages]
    return Bars(title, "median, ms", stages, series)


def train(
    dataset: Annotated[Path | None, typer.Argument(help="good images; none: parts of the simulated line")] = None,
    size: Annotated[str, typer.Option(help="small or medium")] = "small",
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the network's input, px")] = "256x256",
    steps: Annotated[int, typer.Option(min=1, help="steps a side in each of five rounds")] = 8,
    precision: Annotated[str, typer.Option(help="of inspectord's side: auto, fp32 or bf16")] = "auto",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Compare training steps per second with a straightforward implementation of the published recipe."""
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        from calibrate.options import TrainOptions
        from daemon.progress import ConsoleListener
        from pipeline.geometry import Geometry
        from pipeline.preprocess import PreprocessSpec

        files = Files.checked(json_file, plot)
        width, height = pair(image_size, "--image-size", "512x512")
        one_of(size, "--size", *_SIZES)
        one_of(precision, "--precision", "auto", "fp32", "bf16")
        one_of(device, "--device", "auto", "cpu", "cuda")
        options = TrainOptions(
            dataset=dataset or _draw_parts(Path(folder)),
            out=Path(folder) / "out",
            size=size,  # type: ignore[arg-type]
            geometry=Geometry(width, height),
            preprocess=PreprocessSpec(width, height),
            precision=precision,  # type: ignore[arg-type]
            device=device,  # type: ignore[arg-type]
        )
        from calibrate.bench_train import bench_train

        with ConsoleListener("rounds") as listener:
            found = bench_train(options, steps, listener)
        columns = [
            ("side", ""), ("precision", ""), ("steps_per_s", ".2f"), ("slowest_steps_per_s", ".2f"),
            ("fastest_steps_per_s", ".2f"), ("ratio_to_reference", ".2f"), ("mean_loss", ".4f"),
        ]  # fmt: skip
        rates = {r["side"]: [r["steps_per_s"]] for r in found["results"]}
        show(found, columns, files, Bars("Training", "steps a second", [size], rates))


def soak(
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="how long; default 2 where --frames is not given")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="or until so many verdicts")] = None,
    model: ModelOption = None,
    seed: Annotated[int, typer.Option(help="of the order of the faults")] = 0,
    pause_s: Annotated[
        float, typer.Option(min=0, help="mean pause, s; eight failures of a thread in a minute end the process")
    ] = 1.0,
    without: Annotated[
        list[str] | None,
        typer.Option(help="a fault to leave out, such as 'kill -9', to see what memory does; repeatable"),
    ] = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Run a station on the simulated line, inject every fault there is, and count what a subscriber missed."""
    from daemon.soak import FAULTS, SoakFailed, SoakLine
    from daemon.soak import soak as run_soak

    if minutes is None and frames is None:
        minutes = 2.0
    with clear_errors(), tempfile.TemporaryDirectory() as folder:
        files = Files.checked(json_file, plot)
        left_out = [one_of(name, "--without", *FAULTS) for name in without or ()]
        line = SoakLine(Path(folder) / "line", model or _quick_model(Path(folder), 64))
        failed: SoakFailed | None = None
        try:
            for name, so_far in run_soak(line, minutes, frames, seed, pause_s, left_out):
                took_ms = so_far.recovery_ms[name][-1]
                typer.echo(f"{so_far.last_sequence:>9}  {name:<26} judged again after {took_ms:8.0f} ms")
        except SoakFailed as error:
            failed = error
            typer.echo((line.folder / "daemon.log").read_text()[-4000:], err=True)
        finally:
            line.close()
        found = line.result.to_json()
        if failed is not None:
            found["totals"] |= {"failed": str(failed), "after": line.after}
        columns = [("fault", ""), ("injected", "d"), ("median_recovery_ms", "d")]
        faults = [r["fault"] for r in found["results"]]
        recovered = {"recovery": [r["median_recovery_ms"] for r in found["results"]]}
        show(found, columns, files, Bars("Judged again after", "median, ms", faults, recovered) if faults else None)
        for name, value in found["totals"].items():
            typer.echo(f"{name:<16}{value}")
        if failed is not None:
            raise failed


def _quick_model(folder: Path, side_px: int) -> Path:
    """Train a bundle for a few steps: as fast as a good one, and good for nothing else."""
    from calibrate.options import TrainOptions
    from calibrate.train import train as train_bundle
    from pipeline.geometry import Geometry
    from pipeline.preprocess import PreprocessSpec

    good, model = folder / "good", folder / "model"
    good.mkdir()
    options = TrainOptions(
        dataset=_draw_parts(good),
        out=model,
        geometry=Geometry(side_px, side_px),
        preprocess=PreprocessSpec(side_px, side_px),
        steps=4,
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
