"""Reads options that are more than a word or a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

if TYPE_CHECKING:
    from drivers.frame import PixelFormat
    from pipeline.engines import DeviceChoice, PrecisionChoice
    from pipeline.scoring import FrameArea


DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]
EnginePrecisionOption = Annotated[str, typer.Option(help="of the engine: auto, fp32; CPU: bf16, int8; CUDA: fp16")]
SecretOption = Annotated[
    Path | None, typer.Option(help="this client's .key_secret, for TCP with keys", dir_okay=False, exists=True)
]
ServerKeyOption = Annotated[str | None, typer.Option(help="the daemon's public key, for TCP with keys")]
PartOption = Annotated[
    str | None,
    typer.Option(
        help="where parts were photographed several times: a regular expression whose first group, in a "
        "photograph's name, says which part it shows, such as 'part([0-9]+)'"
    ),
]
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="the station's YAML file", dir_okay=False)]


def numbers(text: str, pattern: str, option: str, example: str) -> list[int]:
    """Read whole numbers out of an option such as 512x512. Raises typer.BadParameter."""
    match = re.fullmatch(pattern, text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not like {example}", param_hint=option)
    return [int(number) for number in match.groups()]


def pair(text: str, option: str, example: str) -> tuple[int, int]:
    """Read two whole numbers such as 512x512. Raises typer.BadParameter."""
    first, second = numbers(text, r"(\d+)x(\d+)", option, example)
    return first, second


def engine_words(device: str, precision: str) -> tuple[DeviceChoice, PrecisionChoice]:
    """Check --device and --precision of an engine. Raises typer.BadParameter."""
    from pipeline.engines import DeviceChoice, PrecisionChoice

    one_of(device, "--device", *get_args(DeviceChoice))
    one_of(precision, "--precision", *get_args(PrecisionChoice))
    return cast(DeviceChoice, device), cast(PrecisionChoice, precision)


def format_named(name: str) -> PixelFormat:
    """Read --pixel-format. Raises typer.BadParameter."""
    from drivers.frame import PixelFormat

    return PixelFormat(one_of(name, "--pixel-format", *(each.value for each in PixelFormat)))


def part_pattern(pattern: str | None) -> str | None:
    """Check --part. Raises typer.BadParameter."""
    if pattern is None:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise typer.BadParameter(f"no regular expression: {error}", param_hint="--part") from error
    if groups == 0:
        raise typer.BadParameter(f"needs a group: ({pattern})", param_hint="--part")
    return pattern


def area(text: str) -> FrameArea:
    """Read a region of interest. Raises typer.BadParameter."""
    from pipeline.scoring import FrameArea

    x, y, width, height = numbers(text, r"(\d+),(\d+),(\d+),(\d+)", "--roi", "100,50,800,600")
    if width < 3 or height < 3:
        raise typer.BadParameter("width and height must be at least 3 px", param_hint="--roi")
    return FrameArea(x, y, width, height)


def check_folder(path: Path, option: str) -> None:
    """Say that what should be a folder is a file. Raises typer.BadParameter."""
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"{path.absolute()} is a file; name a folder", param_hint=option)


def check_file(path: Path | None, option: str) -> None:
    """Say before the work, not after it, that a file cannot be written. Raises typer.BadParameter."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {path.absolute().parent}", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path.absolute()} is a folder; name a file", param_hint=option)
    from pipeline.bundle import check_result

    try:
        check_result(path)
    except PermissionError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def one_of(value: str, option: str, *allowed: str) -> str:
    """Check that an option has one of its allowed values. Raises typer.BadParameter."""
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
    return value
