"""Judge kept images again, to see what another bundle or threshold would change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.images import read_picture
from drivers.paths import files_below
from pipeline.bundle import read_bundle
from pipeline.engines import DeviceChoice, PrecisionChoice, make_engine
from pipeline.inspect import Inspector
from pipeline.plausible import PlausibleLimits


@dataclass(frozen=True, slots=True)
class Judgement:
    """One image, judged before and now."""

    name: str
    before: str
    """As published; empty for a capture, which had no verdict of its own."""
    after: str
    changed: bool


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A description whose image cannot be judged."""

    path: Path
    error: str


def judge_again(
    folder: Path, model: Path, threshold: float | None, device: DeviceChoice, precision: PrecisionChoice
) -> Iterator[Judgement | Unreadable]:
    """Judge every kept image below a folder. Raises BundleError, EngineUnavailable or FileNotFoundError."""
    descriptions = sorted(file for file in files_below(folder) if file.suffix == ".json")
    if not descriptions:
        raise FileNotFoundError(f"{folder.absolute()}: no kept images there")
    bundle = read_bundle(model)
    engine = make_engine(bundle, device, precision=precision).engine
    # One image says nothing of frozen ones, and the files need not follow one another.
    inspector = Inspector(bundle, engine, limits=PlausibleLimits(frozen_frames=0), threshold=threshold)
    for path in descriptions:
        try:
            frame, verdict = read_picture(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield Unreadable(path, f"{type(error).__name__}: {error}")
            continue
        found = inspector.inspect(frame)
        reason = None if found.reason is None else found.reason.value
        after = _words(found.outcome.value, reason, found.score)
        if verdict is None:
            yield Judgement(path.stem, "", after, changed=False)
            continue
        before = _words(verdict["verdict"], verdict["reason"], verdict["score"])
        yield Judgement(path.stem, before, after, changed=verdict["verdict"] != found.outcome.value)


def _words(verdict: str, reason: str | None, score: float | None) -> str:
    return f"{verdict}/{reason}" if reason else f"{verdict} {score:.4f}" if score is not None else verdict
