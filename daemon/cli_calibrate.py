"""The `inspectord` command: training and evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli_errors import clear_errors

if TYPE_CHECKING:
    from pipeline.scoring import FrameArea


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    app.command()(evaluate)


def train(
    dataset: Annotated[Path, typer.Argument(help="a folder of good images, or a tree with train/good")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the bundle")],
    steps: Annotated[int, typer.Option(min=1, help="training steps; the paper takes 70000")] = 2000,
    size: Annotated[str, typer.Option(help="small (EfficientAD-S) or medium (EfficientAD-M)")] = "small",
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the network's input, px")] = "256x256",
    tiles: Annotated[str, typer.Option(help="ROWSxCOLUMNS of pieces; saves memory, same map")] = "1x1",
    padded: Annotated[bool, typer.Option("--padded", help="the paper's padded PDN (64x64 maps)")] = False,
    roi: Annotated[str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the region of interest, px")] = None,
    ignore_mask: Annotated[Path | None, typer.Option(help="full-frame PNG, ignored where not black")] = None,
    dark_frame: Annotated[Path | None, typer.Option(help="full-frame image taken without light")] = None,
    flat_field: Annotated[Path | None, typer.Option(help="full-frame image of an even target")] = None,
    pixel_format: Annotated[str | None, typer.Option(help="of the files, such as Mono12 or BayerRG8")] = None,
    natural: Annotated[Path | None, typer.Option(help="images for the pretraining penalty")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="share kept for calibration")] = 0.1,
    false_reject_rate: Annotated[float, typer.Option(min=0.0001, max=0.5, help="wanted, of good parts")] = 0.01,
    learning_rate: Annotated[float, typer.Option(min=1e-7, max=0.1, help="a tenth of it from 95% on")] = 1e-4,
    hard_quantile: Annotated[float, typer.Option(min=0.0, max=0.999999, help="the paper's p_hard")] = 0.999,
    quantile_a: Annotated[float, typer.Option(min=0.0, max=1.0, help="level that becomes 0 in the map")] = 0.9,
    quantile_b: Annotated[float, typer.Option(min=0.0, max=1.0, help="level that becomes 0.1")] = 0.995,
    penalty: Annotated[bool, typer.Option(help="pretraining penalty, where --natural is given")] = True,
    autoencoder: Annotated[bool, typer.Option(help="train the autoencoder branch")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    cache_mib: Annotated[int, typer.Option(min=0, help="memory for prepared images")] = 2048,
    checkpoint_s: Annotated[float, typer.Option(min=0, help="seconds between checkpoints")] = 30.0,
    restart: Annotated[bool, typer.Option("--restart", help="forget an unfinished run's checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished bundle")] = False,
) -> None:
    """Train a bundle on good images; the same command goes on after Ctrl-C or a crash."""
    with clear_errors():
        from calibrate.losses import LossOptions
        from calibrate.train import TrainOptions, load_correction, load_mask
        from calibrate.train import train as train_bundle
        from daemon.progress import ConsoleListener
        from drivers.frame import PixelFormat
        from pipeline.geometry import Geometry
        from pipeline.preprocess import PreprocessSpec

        width, height = _numbers(image_size, r"(\d+)x(\d+)", "--image-size", "512x512")
        rows, columns = _numbers(tiles, r"(\d+)x(\d+)", "--tiles", "2x3")
        if quantile_a >= quantile_b:
            raise typer.BadParameter(f"must lie above --quantile-a {quantile_a}", param_hint="--quantile-b")
        options = TrainOptions(
            dataset=dataset,
            out=out,
            size=_one_of(size, "--size", "small", "medium"),  # type: ignore[arg-type]
            geometry=Geometry(width, height, padded, rows, columns),
            preprocess=PreprocessSpec(
                width,
                height,
                roi=None if roi is None else _area(roi),
                dark=None if dark_frame is None else load_correction(dark_frame),
                flat=None if flat_field is None else load_correction(flat_field),
                ignore=None if ignore_mask is None else load_mask(ignore_mask),
            ),
            pixel_format=None
            if pixel_format is None
            else PixelFormat(_one_of(pixel_format, "--pixel-format", *(f.value for f in PixelFormat))),
            steps=steps,
            seed=seed,
            learning_rate=learning_rate,
            held_out_share=held_out,
            false_reject_rate=false_reject_rate,
            losses=LossOptions(hard_quantile, penalty, autoencoder),
            quantile_levels=(quantile_a, quantile_b),
            natural=natural,
            device=_one_of(device, "--device", "auto", "cpu", "cuda"),  # type: ignore[arg-type]
            precision=_one_of(precision, "--precision", "auto", "fp32", "bf16"),  # type: ignore[arg-type]
            cache_mib=cache_mib,
            checkpoint_s=checkpoint_s,
            restart=restart,
            overwrite=overwrite,
        )
        with ConsoleListener() as listener:
            bundle = train_bundle(options, listener)
        bound = bundle.calibration["false_reject_bound"]
        typer.echo(
            f"{out}: model {bundle.model_id}, calibration {bundle.calibration_id}\n"
            f"threshold {bundle.threshold:.4f} from {bundle.calibration['held_out_images']} held-out images; "
            f"expected false-reject rate at most {bound:.2%}"
        )
        if bound > false_reject_rate:
            needed = round(1 / false_reject_rate)
            typer.echo(f"the wanted {false_reject_rate:.2%} needs about {needed} held-out images")


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    dataset: Annotated[Path, typer.Argument(help="a tree with test/KIND, or good/ beside other kinds")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Score a test set and print image AU-ROC, over all and for each kind of defect."""
    with clear_errors():
        from calibrate.evaluate import evaluate as evaluate_bundle
        from daemon.progress import ConsoleListener
        from pipeline.bundle import read_bundle

        chosen = _one_of(device, "--device", "auto", "cpu", "cuda")
        with ConsoleListener("scoring") as listener:

            def on_image(done: int, total: int) -> None:
                listener.step(done, total, {})
                if listener.should_stop():
                    raise KeyboardInterrupt

            result = evaluate_bundle(
                read_bundle(bundle),
                dataset,
                chosen,  # type: ignore[arg-type]
                on_image,
            )
    defective = sum(kind.images for kind in result.kinds.values())
    typer.echo(f"image AU-ROC {result.auroc:.4f} ({result.good_images} good, {defective} defective)")
    for name, kind in result.kinds.items():
        typer.echo(
            f"  {name:<20} {kind.auroc:.4f}   {kind.found} of {kind.images} above threshold {result.threshold:.4f}"
        )
    typer.echo(f"  {'good':<20}          {result.false_rejects} of {result.good_images} above the threshold")


def _numbers(text: str, pattern: str, option: str, example: str) -> list[int]:
    match = re.fullmatch(pattern, text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not like {example}", param_hint=option)
    return [int(number) for number in match.groups()]


def _area(text: str) -> FrameArea:
    from pipeline.scoring import FrameArea

    x, y, width, height = _numbers(text, r"(\d+),(\d+),(\d+),(\d+)", "--roi", "100,50,800,600")
    if width < 3 or height < 3:
        raise typer.BadParameter("width and height must be at least 3 px", param_hint="--roi")
    return FrameArea(x, y, width, height)


def _one_of(value: str, option: str, *allowed: str) -> str:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    return value
