"""The `inspectord` command: teachers, and models of other projects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli_calibrate import say_bundle
from daemon.cli_errors import clear_errors
from daemon.cli_options import PartOption, area, one_of, pair, part_pattern


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(teachers)
    app.command()(pretrain)
    app.command("import")(import_foreign)
    app.command("fetch-teacher")(fetch_teacher)


def teachers() -> None:
    """List the teachers that ship, the default of each size first."""
    with clear_errors():
        from calibrate.teacher import SHIPPED, read_teacher, shipped_teachers

        for size in ("small", "medium"):
            for name in shipped_teachers(size):
                teacher = read_teacher(SHIPPED / f"{name}-{size}.safetensors")
                typer.echo(f"{size:<8}{name:<14}{teacher.facts['origin']}")
        typer.echo(f"model card: {SHIPPED / 'README.md'}")


def pretrain(
    out: Annotated[Path, typer.Option("--out", "-o", help="the teacher's file, .safetensors")],
    size: Annotated[str, typer.Option(help="small or medium")] = "small",
    target: Annotated[
        str,
        typer.Option(help="procedural (no photographs), photographs (labelled ones, too), backbone (the paper's)"),
    ] = "procedural",
    images: Annotated[
        Path | None,
        typer.Option(
            help="photographs: a folder for each class, or .npz with jpeg, offsets, labels; backbone: any folder"
        ),
    ] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="state dict of a ResNet, such as torchvision's wide_resnet101_2")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="instead of the target's own number")] = None,
    scenes: Annotated[int, typer.Option(min=100, help="procedural scenes to draw")] = 60_000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16; a backbone is distilled in fp32")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cpu or cuda: where a backbone is distilled; the rest learns on the CPU")
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
) -> None:
    """Make a teacher: a patch description network that describes what is in front of it."""
    with clear_errors():
        from calibrate.pretrain import PretrainOptions
        from calibrate.pretrain import pretrain as make_teacher
        from daemon.progress import ConsoleListener

        options = PretrainOptions(
            out=out,
            size=one_of(size, "--size", "small", "medium"),  # type: ignore[arg-type]
            target=one_of(target, "--target", "procedural", "photographs", "backbone"),  # type: ignore[arg-type]
            images=images,
            backbone=backbone,
            steps=steps,
            scenes=scenes,
            seed=seed,
            precision=one_of(precision, "--precision", "auto", "fp32", "bf16"),  # type: ignore[arg-type]
            device=one_of(device, "--device", "auto", "cpu", "cuda"),  # type: ignore[arg-type]
            overwrite=overwrite,
        )
        with ConsoleListener("pretraining") as listener:
            digest = make_teacher(options, listener)
    typer.echo(f"{out.absolute()}: {out.stat().st_size / 1e6:.1f} MB, SHA-256 {digest}")


def import_foreign(
    source: Annotated[Path, typer.Argument(help="a teacher's file, a checkpoint, or the reference's folder")],
    out: Annotated[Path, typer.Option("--out", "-o", help="a file for a teacher, a folder for a model's bundle")],
    good: Annotated[
        Path | None,
        typer.Option(
            help="good images that the model was not trained on: a whole model's threshold comes from them"
        ),
    ] = None,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT that the model was trained at")] = "256x256",
    padded: Annotated[bool, typer.Option("--padded", help="the model was trained with padding")] = False,
    roi: Annotated[str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the region of interest, px")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.9,
            help="share kept for calibration; without it a tenth, or, where the file brings the teacher's "
            "statistics, all but one",
        ),
    ] = None,
    part: PartOption = None,
    false_reject_rate: Annotated[float, typer.Option(min=0.0001, max=0.5, help="wanted, of good parts")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="of the split")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
) -> None:
    """Take over a teacher or a model of the nelson1425 reference or of anomalib, without unpickling code."""
    with clear_errors():
        from calibrate.foreign import ImportFailed, read_foreign
        from calibrate.importing import import_model
        from calibrate.options import TrainOptions
        from calibrate.teacher import Teacher, write_teacher
        from daemon.progress import ConsoleListener
        from pipeline.bundle import is_bundle
        from pipeline.geometry import Geometry
        from pipeline.preprocess import PreprocessSpec

        width, height = pair(image_size, "--image-size", "512x512")
        if (out.is_file() or is_bundle(out)) and not overwrite:
            raise ImportFailed(f"{out.absolute()} exists; add --overwrite to replace it")
        found = read_foreign(source)
        if isinstance(found, Teacher):
            digest = write_teacher(found, out)
            typer.echo(f"{out.absolute()}: a {found.size} teacher, SHA-256 {digest}; use it with --teacher {out}")
            return
        if good is None:
            raise ImportFailed(f"{source.absolute()} is a whole model: add --good DIR, its good images")
        if out.is_file():
            raise ImportFailed(f"{out.absolute()} is a file; a whole model becomes a folder")
        options = TrainOptions(
            dataset=good,
            out=out,
            size=found.size,
            geometry=Geometry(width, height, padded),
            preprocess=PreprocessSpec(width, height, roi=None if roi is None else area(roi)),
            held_out_share=held_out or (0.1 if found.statistics is None else 1.0),
            part=part_pattern(part),
            false_reject_rate=false_reject_rate,
            seed=seed,
            overwrite=overwrite,
        )
        with ConsoleListener() as listener:
            bundle = import_model(found, options, listener)
        say_bundle(bundle, options)


def fetch_teacher(
    url: Annotated[str, typer.Argument(help="http, https or file")],
    sha256: Annotated[str, typer.Option(help="of the file, 64 hex digits")],
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write it")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
) -> None:
    """Download a teacher, checked against its SHA-256 before anything is written."""
    with clear_errors():
        from calibrate.fetch import FetchMisused, fetch

        if out.exists() and not overwrite:
            raise FetchMisused(f"{out.absolute()} exists; add --overwrite to replace it")
        fetch(url, sha256, out)
    typer.echo(f"{out.absolute()}: {out.stat().st_size} bytes, SHA-256 as pinned")
