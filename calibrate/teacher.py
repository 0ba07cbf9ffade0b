"""Teachers: the ones that ship, files of teachers, random ones, and their channels' statistics."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline.architecture import TEACHER_CHANNELS, PdnSize
from pipeline.bundle import sha256_hex, write_result
from pipeline.geometry import Geometry
from pipeline.networks import pdn

SHIPPED = Path(__file__).parent / "teachers"
FORMAT = "inspectord.teacher/1"
RANDOM = "random"
WHITENING_FLOOR = 1e-3
_DEAD_CHANNEL_STD = 1e-6


class TeacherError(Exception):
    """A teacher that is missing, damaged or of another size; the message says which ones there are."""


@dataclass(frozen=True)
class Teacher:
    """A patch description network's weights with their origin."""

    size: PdnSize
    weights: dict[str, Tensor] = field(repr=False)
    """State dict of `pdn`, float32."""
    facts: dict[str, Any]
    """The model card's short form: name, origin, data, command, seed."""


def shipped_teachers(size: PdnSize) -> list[str]:
    """Name the teachers of a size that ship, the default first."""
    suffix = f"-{size}.safetensors"
    names = sorted(path.name.removesuffix(suffix) for path in SHIPPED.glob(f"*{suffix}"))
    return sorted(names, key=lambda name: name != "procedural")


def find_teacher(name: str | None, size: PdnSize, seed: int) -> Teacher:
    """Load a teacher.

    Args:
        name: of a shipped teacher, `random`, a file's path, or None for the shipped default.
        size: that is wanted.
        seed: of a random teacher.

    Raises TeacherError.
    """
    shipped = shipped_teachers(size)
    if name is None:
        if not shipped:
            raise TeacherError(f"no {size} teacher ships; give --teacher a file, or {RANDOM}")
        name = shipped[0]
    if name == RANDOM:
        facts = {"name": RANDOM, "origin": "random weights, no training", "seed": seed}
        return Teacher(size, random_teacher(size, seed).state_dict(), facts)
    path = SHIPPED / f"{name}-{size}.safetensors" if name in shipped else Path(name)
    if not path.is_file():
        known = ", ".join([*shipped, RANDOM])
        raise TeacherError(f"--teacher {name}: no such file; {size} teachers that ship: {known}")
    teacher = read_teacher(path)
    if teacher.size != size:
        raise TeacherError(f"{path.absolute()}: a teacher of size {teacher.size}; add --size {teacher.size}")
    return teacher


def read_teacher(path: Path) -> Teacher:
    """Read a teacher file that `write_teacher` wrote. Raises TeacherError."""
    try:
        blob = path.read_bytes()
        tensors = load_tensors(blob)
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
        if header.get("format") != FORMAT:
            raise ValueError("not a teacher file of inspectord; `inspectord import` makes one of other formats")
        size = header["size"]
        if size not in get_args(PdnSize):
            raise ValueError(f"size {size!r} is not known")
        weights = {name: tensor.float() for name, tensor in tensors.items()}
        check_teacher(weights, size)
        facts = json.loads(header["facts"])
        if not isinstance(facts, dict) or not {"name", "origin"} <= facts.keys():
            raise ValueError("its facts do not tell name and origin")
        return Teacher(size, weights, {**facts, "sha256": sha256_hex(blob)})
    except SafetensorError as error:
        raise TeacherError(
            f"{path.absolute()}: not a safetensors file ({error}); inspectord import takes other formats over"
        ) from error
    except (OSError, KeyError, ValueError) as error:
        raise TeacherError(f"{path.absolute()}: {error}") from error


def check_teacher(weights: dict[str, Tensor], size: PdnSize) -> None:
    """Check names, shapes and finite values of a teacher's weights. Raises ValueError."""
    wanted = pdn(size, TEACHER_CHANNELS, padded=False).state_dict()
    if weights.keys() != wanted.keys():
        raise ValueError(f"tensors {sorted(weights)} are not those of a {size} teacher, {sorted(wanted)}")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(f"tensor {name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds values that are not finite")


def write_teacher(teacher: Teacher, path: Path) -> str:
    """Write a teacher file, float16; returns its SHA-256. Raises OSError, or TeacherError on overflow."""
    half = {name: tensor.detach().cpu().to(torch.float16).contiguous() for name, tensor in teacher.weights.items()}
    try:
        check_teacher(half, teacher.size)
    except ValueError as error:
        raise TeacherError(f"{path.absolute()} cannot be written in float16: {error}") from error
    facts = json.dumps({k: v for k, v in teacher.facts.items() if k != "sha256"}, sort_keys=True)
    blob = save_tensors(half, {"format": FORMAT, "size": teacher.size, "facts": facts})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_result(path, blob)
    return sha256_hex(blob)


def random_teacher(size: PdnSize, seed: int) -> nn.Sequential:
    """Make a teacher with seeded random weights: what a trained one is measured against."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pdn(size, TEACHER_CHANNELS, padded=False).requires_grad_(False).eval()


@torch.no_grad()
def fold_into_last(network: nn.Sequential, mean: Tensor, matrix: Tensor) -> None:
    """Let a PDN's last convolution give matrix · (features − mean); exact, and one rounding less.

    Args:
        network: changed in place.
        mean: (channels,)
        matrix: (channels, channels); a diagonal one scales each channel.
    """
    last = network[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    weight, bias = last.weight.double().cpu(), last.bias.double().cpu()
    last.weight.copy_((matrix.double() @ weight.flatten(1)).reshape(weight.shape))
    last.bias.copy_(matrix.double() @ (bias - mean.double()))


def whitening(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find what makes features uncorrelated with variance 1 in every direction (ZCA).

    Directions with less than WHITENING_FLOOR of the largest variance are not amplified further.

    Args:
        features: (384, cells) a piece at a time; two passes would cost more than float64 does.

    Returns:
        Mean (384,) and matrix (384, 384), float64.
    """
    count, mean = 0, torch.zeros(TEACHER_CHANNELS).double()
    products = torch.zeros(TEACHER_CHANNELS, TEACHER_CHANNELS).double()
    for piece in features:
        values = piece.double()
        count += values.shape[1]
        mean += values.sum(dim=1)
        products += values @ values.T
    mean /= count
    variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    scale = 1 / torch.sqrt(variances.clamp_min(variances.max() * WHITENING_FLOOR))
    return mean, directions @ torch.diag(scale) @ directions.T


def layout_share(features: Iterable[Tensor]) -> float:
    """Find how much of the features' variance lies in where they are.

    Near 1 for parts in one position, 0 for surfaces, below 0 where images are few. It is what the mean over every
    other image explains of the rest, place by place, each channel with variance 1; 1 where nothing ever changes.

    Args:
        features: (384, cells) float32 of each image, of at least two.
    """
    squares, count = torch.zeros(2, TEACHER_CHANNELS, dtype=torch.float64), [0, 0]
    sums: list[Tensor | float] = [0.0, 0.0]
    for index, image in enumerate(features):
        half = index % 2
        sums[half] = sums[half] + image
        squares[half] += image.square().sum(dim=1, dtype=torch.float64)
        count[half] += 1
    a, b = (torch.as_tensor(one) for one in sums)
    cells = a.shape[1]

    def missed(guess: Tensor) -> Tensor:
        """Return each channel's squared errors over the second half's images."""
        crossed, own = (guess * b).sum(dim=1, dtype=torch.float64), guess.square().sum(dim=1, dtype=torch.float64)
        return squares[1] - 2 * crossed + count[1] * own

    mean = (a + b).sum(dim=1, dtype=torch.float64) / (sum(count) * cells)
    variance = squares.sum(dim=0) / (sum(count) * cells) - mean.square()
    weight = torch.where(variance < _DEAD_CHANNEL_STD**2, 0, 1 / variance)
    by_place, everywhere = missed(a / count[0]), missed(mean.float()[:, None].expand_as(b))
    around = float((weight * everywhere).sum())
    return 1 - float((weight * by_place).sum()) / around if around > 0 else 1.0


def channel_statistics(features: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation of each teacher channel over all training images.

    Two passes merged image by image in float64 (Chan et al.), so no digits are lost to E[x²] − E[x]².

    Args:
        features: (384, cells) float32, a piece at a time.

    Returns:
        Mean and standard deviation, (384,) float32 each; a channel that never changes gets 1.
    """
    count = 0
    mean = torch.zeros(TEACHER_CHANNELS, dtype=torch.float64)
    squares = torch.zeros(TEACHER_CHANNELS, dtype=torch.float64)
    for piece in features:
        here = piece.shape[1]
        # Within one piece, float32 around the piece's own mean loses nothing that matters; across pieces it would.
        here_mean = piece.mean(dim=1, keepdim=True)
        centred = piece - here_mean
        shift = here_mean[:, 0].double() - mean
        squares += centred.square().sum(dim=1).double() + shift.square() * (count * here / (count + here))
        mean += shift * (here / (count + here))
        count += here
    std = (squares / count).sqrt()
    std = torch.where(std < _DEAD_CHANNEL_STD, torch.ones_like(std), std)
    return mean.float(), std.float()


def teacher_features(teacher: nn.Module, image: Tensor, geometry: Geometry) -> Iterable[Tensor]:
    """Yield the features of one image, tile by tile, each cell once; (384, cells) float32 each."""
    seen = torch.zeros(geometry.map_height, geometry.map_width, dtype=torch.bool)
    for tile in geometry.tiles():
        features = teacher(image[:, :, tile.y_px, tile.x_px])[0].float().cpu()
        new = ~seen[tile.rows, tile.columns]
        seen[tile.rows, tile.columns] = True
        yield features[:, new]
