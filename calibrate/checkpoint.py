"""Training's checkpoints: one safetensors file, replaced atomically, with the run's settings inside."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline.bundle import write_atomically
from pipeline.networks import EfficientAD

FILE = "checkpoint.safetensors"


class CheckpointError(Exception):
    """A checkpoint that cannot be read, or that belongs to another run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a checkpoint's header says."""

    step: int
    """Steps done."""
    settings: dict[str, Any]
    """Everything that determines the run."""
    losses: list[list[float]] = field(default_factory=list)
    """Step and mean loss terms on the way."""


def save_checkpoint(folder: Path, model: EfficientAD, optimizer: torch.optim.Adam, progress: Progress) -> None:
    """Write networks and optimiser state. Raises OSError; the previous checkpoint is then still whole."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = value
    header = {
        "step": str(progress.step),
        "settings": json.dumps(progress.settings, sort_keys=True),
        "losses": json.dumps(progress.losses),
    }
    blob = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, header)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / FILE, blob)


def read_progress(folder: Path) -> Progress | None:
    """Read a checkpoint's header; None where there is none. Raises CheckpointError."""
    path = folder / FILE
    if not has_checkpoint(folder):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        return Progress(int(header["step"]), json.loads(header["settings"]), json.loads(header.get("losses", "[]")))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.absolute()}: not a readable checkpoint ({error}); delete it or train with --restart"
        ) from error


def load_checkpoint(folder: Path, model: EfficientAD, optimizer: torch.optim.Adam) -> None:
    """Load networks and optimiser state. Raises CheckpointError."""
    path = folder / FILE
    weights: dict[str, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open has no iterator
                part, _, name = key.partition(".")
                if part == "model":
                    weights[name] = file.get_tensor(key)
                else:
                    index, _, field = name.partition(".")
                    states.setdefault(int(index), {})[field] = file.get_tensor(key)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path.absolute()}: {error}; train with --restart to begin anew") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in states.items():
        for name, value in state.items():
            if value.shape == parameters[index].shape:
                # The fused optimiser walks memory: its state must be laid out as the parameter is.
                state[name] = torch.empty_like(parameters[index], requires_grad=False).copy_(value)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def has_checkpoint(folder: Path) -> bool:
    """Tell whether there is something to go on from."""
    return (folder / FILE).is_file()


def delete_checkpoint(folder: Path) -> None:
    """Remove the checkpoint once the bundle is written, or to begin anew."""
    (folder / FILE).unlink(missing_ok=True)
