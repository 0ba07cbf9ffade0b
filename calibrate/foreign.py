"""Teachers and whole models of other projects, read without running any code that their files name.

Known are the nelson1425 reference (state dicts and pickled modules of a teacher; a training's folder with
`teacher_final.pth`, `student_final.pth`, `autoencoder_final.pth`) and anomalib (teacher files; checkpoints of
EfficientAd). PyTorch's restricted unpickler builds tensors and the few `torch.nn` classes listed here;
every other class in a file becomes an inert placeholder.
"""

from __future__ import annotations

import collections
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from calibrate.teacher import Teacher, check_teacher
from pipeline.architecture import PdnSize
from pipeline.bundle import sha256_hex
from pipeline.geometry import AUTOENCODER_PX

_FINAL = "{}_final.pth"
_MODULES: tuple[type, ...] = (nn.Sequential, nn.Conv2d, nn.ReLU, nn.AvgPool2d, nn.Upsample, nn.Dropout)
_TEACHER_INDICES: dict[PdnSize, tuple[int, ...]] = {"small": (0, 3, 6, 8), "medium": (0, 3, 6, 8, 10, 12)}
_ENCODER_INDICES = (0, 2, 4, 6, 8, 10)
_DECODER_INDICES = (12, 16, 20, 24, 28, 32, 36, 38)


_SNIFFED_BYTES = 64


class ImportFailed(Exception):
    """A file that is not what it should be; the message says what was expected."""


@dataclass(frozen=True)
class ForeignModel:
    """A trained model of another project, in our names."""

    size: PdnSize
    weights: dict[str, Tensor] = field(repr=False)
    """State dict of `EfficientAD` without the teacher's statistics."""
    image_px: int | None
    """Side of the only input that its autoencoder works at as ours does; None: any."""
    statistics: tuple[Tensor, Tensor] | None
    """Mean and standard deviation of the teacher's channels, (384,) each; None where they were not saved."""
    padded: bool | None
    """Trained with padding; None where the file does not say."""
    origin: str


def read_foreign(source: Path) -> Teacher | ForeignModel:
    """Read whatever `source` is. Raises ImportFailed."""
    if source.is_dir():
        return _read_reference_folder(source)
    loaded = _load(source)
    state = _tensors(loaded, source)
    if any(name.startswith("model.teacher.") for name in state):
        return _anomalib_checkpoint(state, _trained_with(loaded, "padding"), source)
    return _teacher(state, source)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a PyTorch or safetensors file by name. Raises ImportFailed."""
    return _tensors(_load(path), path)


def _load(path: Path) -> Any:
    """Read what a PyTorch or safetensors file holds. Raises ImportFailed."""
    if not path.is_file():
        raise ImportFailed(f"{path.absolute()}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES)
        if head and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
            raise ImportFailed(
                f"{path.absolute()}: text instead of weights, perhaps a web page or a Git LFS pointer: it begins "
                f"with {head[:32].decode()!r}"
            )
        loaded = load_file(path) if path.suffix == ".safetensors" else _load_restricted(path)
        return loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
    except ImportFailed:
        raise
    except Exception as error:
        # The restricted unpickler may fail in any way on a file that is damaged or wants more than it allows.
        raise ImportFailed(
            f"{path.absolute()}: not a readable PyTorch or safetensors file: {_reason(error)}"
        ) from error


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise ImportFailed(f"{path.absolute()}: holds a {type(loaded).__name__}, not weights by name")
    state = {str(name): value.float() for name, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise ImportFailed(f"{path.absolute()}: holds no tensors")
    return state


def _reason(error: Exception) -> str:
    """Pick what matters out of a message of many lines; PyTorch's begins with advice to allow everything."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "WeightsUnpickler error" in line]
    if isinstance(error, AttributeError) and "state_dict" in str(error):
        return f"it holds a layer that no teacher has ({error})"
    return (named or lines or [type(error).__name__])[0]


def _load_restricted(path: Path) -> Any:
    """Load with PyTorch's restricted unpickler; classes that are not on the list become placeholders."""
    known = {f"{c.__module__}.{c.__qualname__}" for c in _MODULES}
    # Files from before PyTorch 1.6 are no zip archives and cannot be scanned; they get no placeholders.
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
    foreign = [(_inert(name), name) for name in named if name not in known]
    with torch.serialization.safe_globals([*_MODULES, *foreign, set]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _inert(name: str) -> type:
    """Make a class that takes anything and does nothing, to stand for a class of another project."""

    class Placeholder:
        def __new__(cls, *_args: object, **_named: object) -> Placeholder:
            return super().__new__(cls)

        def __init__(self, *_args: object, **_named: object) -> None:
            pass

        def __setstate__(self, _state: object) -> None:
            pass

    Placeholder.__name__ = name.rpartition(".")[2]
    return Placeholder


def _teacher(state: Mapping[str, Tensor], source: Path) -> Teacher:
    """Recognise a teacher by its names: Sequential indices (the reference) or conv1 … (anomalib)."""
    names = set(state)
    prefix = next((p for p in ("teacher.", "module.", "model.") if all(n.startswith(p) for n in names)), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    size: PdnSize = "medium" if {"12.weight", "conv6.weight"} & set(state) else "small"
    anomalib = "conv1.weight" in state
    weights = _pdn_from_anomalib(state, "", size) if anomalib else dict(state)
    try:
        check_teacher(weights, size)
    except ValueError as error:
        raise ImportFailed(f"{source.absolute()}: not a teacher of 384 channels: {error}") from error
    kind = "anomalib" if anomalib else "the nelson1425 reference"
    facts = {
        "name": source.stem,
        "origin": f"imported from a teacher file of {kind}",
        "source_sha256": sha256_hex(source.read_bytes()),
    }
    return Teacher(size, weights, facts)


def _pdn_from_anomalib(state: Mapping[str, Tensor], prefix: str, size: PdnSize) -> dict[str, Tensor]:
    return _renamed(state, prefix + "conv{}", _TEACHER_INDICES[size], "{}")


def _renamed(state: Mapping[str, Tensor], old: str, indices: tuple[int, ...], new: str) -> dict[str, Tensor]:
    """Rename old.format(1 …) to new.format(indices …), weights and biases; what is missing stays missing."""
    renamed = {}
    for number, index in enumerate(indices, start=1):
        for part in ("weight", "bias"):
            name = f"{old.format(number)}.{part}"
            if name in state:
                renamed[f"{new.format(index)}.{part}"] = state[name]
    return renamed


def _trained_with(loaded: Mapping[str, Any], name: str) -> bool | None:
    """Look a switch up among a checkpoint's hyperparameters; None where it is not told."""
    told = loaded.get("hyper_parameters")
    value = told.get(name) if isinstance(told, Mapping) else None
    return value if isinstance(value, bool) else None


def _anomalib_checkpoint(state: Mapping[str, Tensor], padded: bool | None, source: Path) -> ForeignModel:
    size: PdnSize = "medium" if "model.teacher.conv6.weight" in state else "small"
    weights = {}
    for part in ("teacher", "student"):
        for name, tensor in _pdn_from_anomalib(state, f"model.{part}.", size).items():
            weights[f"{part}.{name}"] = tensor
    weights |= _renamed(state, "model.ae.encoder.enconv{}", _ENCODER_INDICES, "autoencoder.{}")
    weights |= _renamed(state, "model.ae.decoder.deconv{}", _DECODER_INDICES, "autoencoder.{}")
    statistics = None
    if {"model.mean_std.mean", "model.mean_std.std"} <= state.keys() and bool(
        (state["model.mean_std.std"] > 0).all()
    ):
        statistics = state["model.mean_std.mean"].flatten(), state["model.mean_std.std"].flatten()
    return ForeignModel(size, weights, AUTOENCODER_PX, statistics, padded, f"anomalib checkpoint {source.name}")


def _read_reference_folder(folder: Path) -> ForeignModel:
    """Read the folder that the reference's training leaves: three pickled modules or state dicts."""
    weights: dict[str, Tensor] = collections.OrderedDict()
    for part in ("teacher", "student", "autoencoder"):
        path = folder / _FINAL.format(part)
        if not path.is_file():
            raise ImportFailed(f"{path.absolute()}: no such file; the reference's folder has all three *_final.pth")
        weights |= {f"{part}.{name}": tensor for name, tensor in read_state(path).items()}
    size: PdnSize = "medium" if "teacher.12.weight" in weights else "small"
    return ForeignModel(size, dict(weights), None, None, None, f"nelson1425 reference, {folder.name}")
