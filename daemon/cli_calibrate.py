"""The `inspectord` command: training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli_errors import clear_errors
from daemon.cli_options import (
    DeviceOption,
    EnginePrecisionOption,
    PartOption,
    area,
    check_file,
    check_folder,
    engine_words,
    format_named,
    one_of,
    pair,
    part_pattern,
)

if TYPE_CHECKING:
    from calibrate.evaluate import Evaluation
    from calibrate.metrics import Rate
    from calibrate.options import TrainOptions
    from pipeline.bundle import Bundle


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(train)
    app.command()(evaluate)


def train(
    dataset: Annotated[Path, typer.Argument(help="a folder of good images, or a tree with train/good")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the bundle")],
    preset: Annotated[
        str, typer.Option(help="quick (minutes on a CPU), standard (tens of minutes), paper (70000 steps)")
    ] = "standard",
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the preset's")] = None,
    size: Annotated[str, typer.Option(help="small (EfficientAD-S) or medium (EfficientAD-M)")] = "small",
    teacher: Annotated[
        str | None, typer.Option(help="one that ships (inspectord teachers lists them), random, or a file")
    ] = None,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the network's input, px")] = "256x256",
    tiles: Annotated[str, typer.Option(help="ROWSxCOLUMNS of pieces; saves memory, same map")] = "1x1",
    padded: Annotated[bool, typer.Option("--padded", help="the paper's padded PDN (64x64 maps)")] = False,
    roi: Annotated[str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the region of interest, px")] = None,
    ignore_mask: Annotated[Path | None, typer.Option(help="full-frame PNG, ignored where not black")] = None,
    dark_frame: Annotated[Path | None, typer.Option(help="full-frame image taken without light")] = None,
    flat_field: Annotated[Path | None, typer.Option(help="full-frame image of an even target")] = None,
    pixel_format: Annotated[str | None, typer.Option(help="of the files, such as Mono12 or BayerRG8")] = None,
    natural: Annotated[
        Path | None, typer.Option(help="images for the pretraining penalty, instead of procedural ones")
    ] = None,
    flip: Annotated[
        str, typer.Option(help="none, horizontal, vertical or both: how good parts may also lie")
    ] = "none",
    rotate: Annotated[
        float, typer.Option(min=0, max=180, help="degrees to either side by which good parts may be turned")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="share kept for calibration")] = 0.1,
    part: PartOption = None,
    false_reject_rate: Annotated[float, typer.Option(min=0.0001, max=0.5, help="wanted, of good parts")] = 0.01,
    learning_rate: Annotated[
        float | None, typer.Option(min=1e-7, max=0.1, help="instead of the preset's; a tenth of it from 95% on")
    ] = None,
    hard_quantile: Annotated[float, typer.Option(min=0.0, max=0.999999, help="the paper's p_hard")] = 0.999,
    whiten: Annotated[
        bool | None,
        typer.Option(
            help="whiten the teacher's features over the good images, not channel by channel; unsaid: where these "
            "are a surface without a common layout"
        ),
    ] = None,
    relative_map: Annotated[
        bool | None,
        typer.Option(
            help="smooth each map and divide it by what its features let expect and by its own levels, within what "
            "good images show: what stands out of these counts; unsaid: where features are whitened"
        ),
    ] = None,
    quantile_a: Annotated[float, typer.Option(min=0.0, max=1.0, help="level that becomes 0 in the map")] = 0.9,
    quantile_b: Annotated[float, typer.Option(min=0.0, max=1.0, help="level that becomes 0.1")] = 0.995,
    penalty: Annotated[bool, typer.Option(help="pretraining penalty")] = True,
    autoencoder: Annotated[
        bool | None,
        typer.Option(
            help="always use the autoencoder's map, or do not train that branch; unsaid: use it if it learnt"
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16")] = "auto",
    cache_mib: Annotated[
        int,
        typer.Option(min=0, help="memory for prepared images and the teacher's features; at most half of the free"),
    ] = 4096,
    checkpoint_s: Annotated[float, typer.Option(min=0, help="seconds between checkpoints")] = 30.0,
    restart: Annotated[bool, typer.Option("--restart", help="forget an unfinished run's checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a finished bundle")] = False,
) -> None:
    """Train a bundle on good images; the same command goes on after Ctrl-C or a crash."""
    with clear_errors():
        from calibrate.dataset import load_correction, load_mask
        from calibrate.options import PRESETS, LossOptions, TrainOptions, Turns
        from daemon.progress import ConsoleListener
        from pipeline.geometry import Geometry
        from pipeline.preprocess import PreprocessSpec

        width, height = pair(image_size, "--image-size", "512x512")
        rows, columns = pair(tiles, "--tiles", "2x3")
        if quantile_a >= quantile_b:
            raise typer.BadParameter(f"must lie above --quantile-a {quantile_a}", param_hint="--quantile-b")
        one_of(preset, "--preset", *PRESETS)
        chosen = PRESETS[preset]  # type: ignore[index]
        one_of(flip, "--flip", "none", "horizontal", "vertical", "both")
        options = TrainOptions(
            dataset=dataset,
            out=out,
            teacher=teacher,
            preset=preset,  # type: ignore[arg-type]
            turns=Turns(flip in ("horizontal", "both"), flip in ("vertical", "both"), rotate),
            size=one_of(size, "--size", "small", "medium"),  # type: ignore[arg-type]
            geometry=Geometry(width, height, padded, rows, columns),
            preprocess=PreprocessSpec(
                width,
                height,
                roi=None if roi is None else area(roi),
                dark=None if dark_frame is None else load_correction(dark_frame),
                flat=None if flat_field is None else load_correction(flat_field),
                ignore=None if ignore_mask is None else load_mask(ignore_mask),
            ),
            pixel_format=None if pixel_format is None else format_named(pixel_format),
            steps=steps or chosen.steps,
            whiten=whiten,
            relative_map=relative_map,
            seed=seed,
            learning_rate=learning_rate or chosen.learning_rate,
            held_out_share=held_out,
            part=part_pattern(part),
            false_reject_rate=false_reject_rate,
            losses=LossOptions(hard_quantile, penalty, autoencoder is not False),
            quantile_levels=(quantile_a, quantile_b),
            natural=natural,
            autoencoder_map="always" if autoencoder else "auto",
            device=one_of(device, "--device", "auto", "cpu", "cuda"),  # type: ignore[arg-type]
            precision=one_of(precision, "--precision", "auto", "fp32", "bf16"),  # type: ignore[arg-type]
            cache_mib=cache_mib,
            checkpoint_s=checkpoint_s,
            restart=restart,
            overwrite=overwrite,
        )
        # Only now: PyTorch, statistics and plots take seconds to load, and a wrong option should be said at once.
        from calibrate.train import train as train_bundle

        with ConsoleListener() as listener:
            bundle = train_bundle(options, listener)
        say_bundle(bundle, options)


def say_bundle(bundle: Bundle, options: TrainOptions) -> None:
    """Print what was made, and what its threshold promises."""
    from calibrate.normalize import promised_false_reject_rate

    calibration, wanted = bundle.calibration, options.false_reject_rate
    typer.echo(
        f"{options.out}: model {bundle.model_id}, calibration {bundle.calibration_id}\n"
        f"threshold {bundle.threshold:.4f} from {calibration['held_out_images']} held-out images; "
        f"expected false-reject rate {promised_false_reject_rate(bundle)}"
    )
    if calibration["false_reject_bound"] > wanted:
        typer.echo(f"the wanted {wanted:.2%} needs about {round(1 / wanted)} held-out images")


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    dataset: Annotated[Path, typer.Argument(help="MVTec AD, MVTec LOCO, VisA, MTD, or good/ beside other kinds")],
    json_file: Annotated[Path | None, typer.Option("--json", help="write all metrics to this file")] = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML report with pictures into this folder")] = None,
    device: DeviceOption = "auto",
    precision: EnginePrecisionOption = "auto",
) -> None:
    """Score a test set: image and pixel metrics, each kind of defect, rejects and escapes at the threshold."""
    with clear_errors():
        from calibrate.layouts import load_test_set, refuse_among_images
        from daemon.progress import ConsoleListener
        from pipeline.bundle import check_writable, read_bundle, write_result

        engine = engine_words(device, precision)
        loaded = read_bundle(bundle)
        check_file(json_file, "--json")
        if report is not None:
            check_folder(report, "--report")
            refuse_among_images(report, (image.file for image in load_test_set(dataset).images))
            report.mkdir(parents=True, exist_ok=True)
            check_writable(report)
        from calibrate.evaluate import evaluate as evaluate_bundle
        from calibrate.report import write_evaluation_report

        with ConsoleListener("scoring") as listener:
            result = evaluate_bundle(loaded, dataset, *engine, listener)
        _print_evaluation(result)
        if json_file is not None:
            text = json.dumps(result.to_json(), indent=2, allow_nan=False) + "\n"
            write_result(json_file, text.encode())
        if report is not None:
            typer.echo(f"report: {write_evaluation_report(result, loaded, report).absolute()}")


def _print_evaluation(result: Evaluation) -> None:
    if result.seen:
        typer.echo(f"{len(result.seen)} images that the model was trained on are left out")
    if result.stand_ins:
        typer.echo(
            f"no other good images: the {result.stand_ins} that training held out stand in; the threshold is "
            "theirs, so photograph more good parts to see how many it rejects"
        )
    if result.without_mask:
        typer.echo(f"{result.without_mask} defective images have no mask, or a black one: not in the pixel metrics")
    typer.echo(f"{'':<24}{'image AU-ROC':>13}{'AP':>8}{'F1-max':>8}{'pixel AU-ROC':>14}{'AP':>8}{'AU-PRO':>8}")
    rows = [("all", result.image, result.pixel)]
    rows += [(name, kind.image, kind.pixel) for name, kind in result.kinds.items()]
    for name, image, pixel in rows:
        line = f"{name:<24}{image.auroc:>13.4f}{image.ap:>8.4f}{image.f1_max:>8.4f}"
        if pixel is not None:
            line += f"{pixel.auroc:>14.4f}{pixel.ap:>8.4f}{pixel.aupro:>8.4f}"
            if pixel.auspro is not None:
                line += f"   AU-sPRO {pixel.auspro:.4f}"
        typer.echo(line)
    typer.echo(f"at the threshold {result.threshold:.4f}, with 95% intervals:")
    typer.echo(f"  {'good':<22}{_rate(result.false_rejects)} rejected")
    for name, kind in result.kinds.items():
        typer.echo(f"  {name:<22}{_rate(kind.escapes)} escaped")


def _rate(rate: Rate) -> str:
    low, high = rate.interval or (0.0, 1.0)
    return f"{rate.count:>5} of {rate.of:<5} ({low:.1%} to {high:.1%})"
