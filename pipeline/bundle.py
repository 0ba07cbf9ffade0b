"""A trained model on disk: one readable JSON file and the arrays that it names, all with checksums.

A bundle is a folder with `bundle.json`, `weights.safetensors` and, where used, `dark_frame.npy`,
`flat_field.npy` and `ignore_mask.png`. Where a file of that name is there already, ours gets one of its own
(`weights-0123456789ab.safetensors`): a bundle is replaced by the one step that replaces `bundle.json`.
Reading one never unpickles anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from pipeline.architecture import PdnSize, weight_shapes
from pipeline.engine import INT8_SCHEME, Precision
from pipeline.geometry import Geometry
from pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD, PreprocessSpec, check_correction
from pipeline.scoring import BoolMap, FrameArea, Quantiles

FORMAT = "inspectord.bundle/1"
RELATIVE_FORMAT = "inspectord.bundle/2"
"""Of relative maps: a version that does not know them must not apply their quantiles to raw maps."""
MANIFEST = "bundle.json"
WEIGHTS = "weights.safetensors"
_ARRAYS = {"dark": "dark_frame.npy", "flat": "flat_field.npy"}
_IGNORE = "ignore_mask.png"
_PARTIAL = ".partial"
_PART = re.compile(
    "|".join(
        rf"{stem}(-[0-9a-f]{{12}})?\.{suffix}"
        for stem, suffix in (name.split(".") for name in (WEIGHTS, _IGNORE, *_ARRAYS.values()))
    )
)


_STREAM = re.compile(r"/dev/(stdout|stderr|fd/([0-9]+))")


class BundleError(Exception):
    """A bundle that is missing, damaged, truncated or not ours; the message names the file and the reason."""


@dataclass(frozen=True)
class Model:
    """What turns a frame into raw maps."""

    size: PdnSize
    geometry: Geometry
    preprocess: PreprocessSpec
    weights: Mapping[str, NDArray[np.float32]] = field(repr=False)
    """Of the networks, and the teacher's statistics, by the names of `weight_shapes`."""
    ranges: Mapping[str, float] = field(default_factory=dict)
    """Largest magnitude at the input of each convolution in int8; empty where nobody has looked."""


@dataclass(frozen=True, slots=True)
class PrecisionCalibration:
    """What belongs to a precision of an engine, taken from the very same images as float32's.

    The range of levels is float32's, but for its floor.
    """

    quantiles: Quantiles
    threshold: float
    largest_deviation: float
    """Of a score from float32's, as a share of what is tolerated, over good images and pasted anomalies."""
    infer_ms: float
    """Shortest on the machine that calibrated."""

    @property
    def trusted(self) -> bool:
        """Tell whether every score stayed within the tolerance."""
        return self.largest_deviation <= 1

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `asdict` gave. Raises KeyError, TypeError or ValueError when it is not that."""
        numbers = {name: float(data[name]) for name in ("threshold", "largest_deviation", "infer_ms")}
        if not np.isfinite(list(numbers.values())).all():
            raise ValueError("a number of a precision is not finite")
        return cls(Quantiles.from_json(data["quantiles"]), **numbers)


@dataclass(frozen=True)
class Bundle:
    """Everything that turns a frame into a score."""

    model: Model
    quantiles: Quantiles
    threshold: float
    """A part is OK at or below it."""
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """Where the teacher comes from, in words and numbers."""
    precisions: Mapping[Precision, PrecisionCalibration] = field(default_factory=dict)
    """Of the machine that calibrated, the fastest first; `quantiles` and `threshold` above are float32's."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """How the threshold came about."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Steps, seed, losses, fingerprint of the images."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    """RFC 3339, UTC."""
    model_id: str = ""
    """First 12 hex digits of the weights' SHA-256; filled in when written or read."""
    calibration_id: str = ""
    """First 12 hex digits of the SHA-256 of quantiles, threshold, preprocessing and, beside float32, precision."""

    def at(self, precision: Precision) -> Bundle:
        """Return the bundle with the quantiles and the threshold of a precision. Raises KeyError."""
        if precision == "fp32":
            return self
        found = self.precisions[precision]
        return replace(
            self,
            quantiles=found.quantiles,
            threshold=found.threshold,
            calibration_id=sha256_hex(f"{self.calibration_id} {precision}".encode())[:12],
        )


def is_bundle(folder: Path) -> bool:
    """Tell whether a folder holds a finished bundle."""
    return (folder / MANIFEST).is_file()


def write_bundle(bundle: Bundle, folder: Path) -> Bundle:
    """Write a bundle; `bundle.json` comes last, so a folder with it is complete.

    Returns the bundle with its ids. Raises OSError when the disk refuses; one that was there is then still whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = bundle.model
    blobs = {WEIGHTS: save_tensors({name: np.ascontiguousarray(array) for name, array in model.weights.items()})}
    spec = model.preprocess
    for name, file in _ARRAYS.items():
        array = getattr(spec, name)
        if array is not None:
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            blobs[file] = buffer.getvalue()
    if spec.ignore is not None:
        blobs[_IGNORE] = cv2.imencode(".png", spec.ignore.astype(np.uint8) * 255)[1].tobytes()
    files: dict[str, dict[str, Any]] = {
        name: {"sha256": sha256_hex(blob), "bytes": len(blob)} for name, blob in blobs.items()
    }
    preprocessing: dict[str, Any] = {
        "width": spec.width,
        "height": spec.height,
        "roi": None if spec.roi is None else {n: getattr(spec.roi, n) for n in ("x", "y", "width", "height")},
        "dark_frame": _ARRAYS["dark"] if spec.dark is not None else None,
        "flat_field": _ARRAYS["flat"] if spec.flat is not None else None,
        "ignore_mask": _IGNORE if spec.ignore is not None else None,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    calibration = {
        **bundle.calibration,
        "quantiles": bundle.quantiles.to_json(),
        "threshold": bundle.threshold,
    }
    precisions = {
        name: {**asdict(found), "quantiles": found.quantiles.to_json()} for name, found in bundle.precisions.items()
    }
    decisive = {name: [found["quantiles"], found["threshold"]] for name, found in precisions.items()}
    basis = [calibration, preprocessing, files, dict(model.ranges), decisive]
    manifest: dict[str, Any] = {
        "format": RELATIVE_FORMAT if bundle.quantiles.is_relative else FORMAT,
        "created": bundle.created,
        "versions": dict(bundle.versions),
        "model_id": files[WEIGHTS]["sha256"][:12],
        "calibration_id": sha256_hex(_canonical(basis))[:12],
        "architecture": {"name": "EfficientAD", "size": model.size, "geometry": model.geometry.to_json()},
        "preprocessing": preprocessing,
        "calibration": calibration,
        "precisions": [{"precision": name, **found} for name, found in precisions.items()],
        "int8": {**INT8_SCHEME, "activation_ranges": dict(model.ranges)},
        "teacher": dict(bundle.teacher),
        "training": dict(bundle.training),
        "files": files,
    }
    before = _files_named(folder)
    for name, facts in files.items():
        facts["file"] = _free_name(folder, name, blobs[name])
    manifest["checksum"] = sha256_hex(_canonical(manifest))
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    now = {facts["file"] for facts in files.values()}
    try:
        for name, facts in files.items():
            write_atomically(folder / facts["file"], blobs[name])
        write_atomically(folder / MANIFEST, text.encode())
    except OSError:
        _remove(folder, now - before)
        raise
    _remove(folder, (before | _left_behind(folder)) - now)
    return read_bundle(folder)


def _left_behind(folder: Path) -> set[str]:
    """Name what writers that were killed have left: files half written, and those under names only we give."""
    return {
        name
        for name in (path.name for path in folder.iterdir())
        if (part := _PART.fullmatch(name.removesuffix(_PARTIAL)))
        and (name.endswith(_PARTIAL) or part.lastindex is not None)  # a name with a digest
    }


def _free_name(folder: Path, name: str, blob: bytes) -> str:
    """Return the name itself, or one that tells of the content where another file has it already."""
    path = folder / name
    if not path.exists() or path.read_bytes() == blob:
        return name
    stem, _, suffix = name.partition(".")
    return f"{stem}-{sha256_hex(blob)[:12]}.{suffix}"


def _files_named(folder: Path) -> set[str]:
    """Name the files of the bundle that is there; none where there is none, or a damaged one."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        named = {str(facts.get("file", name)) for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in named if _PART.fullmatch(name)}


def _remove(folder: Path, names: set[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # what stays is in nobody's way
            (folder / name).unlink()


def read_bundle(folder: Path) -> Bundle:
    """Read and verify a bundle. Raises BundleError with the file and the reason."""
    text = _read_manifest(folder)
    while True:
        try:
            return _read_as_told(text, folder)
        except BundleError:
            # Another bundle may have taken its place, and its files with it, between two looks.
            text, before = _read_manifest(folder), text
            if text == before:
                raise


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path.absolute()}: no such file; is {folder} a bundle?") from None
    except OSError as error:
        raise BundleError(f"{path.absolute()}: {error.strerror}") from error


def _read_as_told(text: bytes, folder: Path) -> Bundle:
    manifest_path = folder / MANIFEST
    try:
        manifest = json.loads(text, parse_constant=_refuse_constant, parse_float=_read_float)
    except (RecursionError, ValueError) as error:
        raise BundleError(f"{manifest_path.absolute()}: not valid JSON, damaged or truncated: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in (FORMAT, RELATIVE_FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise BundleError(
            f"{manifest_path.absolute()}: format is {found!r}, this version reads {FORMAT!r} "
            f"and {RELATIVE_FORMAT!r}"
        )
    checksum = manifest.pop("checksum", None)
    if checksum != sha256_hex(_canonical(manifest)):
        raise BundleError(
            f"{manifest_path.absolute()}: checksum does not fit: damaged or edited by hand "
            "(set `threshold` in the station's configuration instead of editing a bundle)"
        )
    try:
        return _assemble(manifest, folder)
    except (ArithmeticError, AttributeError, EOFError, KeyError, TypeError, ValueError, cv2.error) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{manifest_path.absolute()}: {reason}") from error


def _assemble(manifest: dict[str, Any], folder: Path) -> Bundle:
    blobs = {name: _read_file(folder, name, facts) for name, facts in manifest["files"].items()}
    architecture, preprocessing = manifest["architecture"], manifest["preprocessing"]
    if architecture["name"] != "EfficientAD" or architecture["size"] not in ("small", "medium"):
        raise ValueError(f"architecture {architecture['name']} {architecture['size']} is not known")
    size = cast(PdnSize, architecture["size"])
    geometry = Geometry.from_json(architecture["geometry"])
    if (preprocessing["mean"], preprocessing["std"]) != (list(IMAGENET_MEAN), list(IMAGENET_STD)):
        raise ValueError("preprocessing normalises by other constants than ImageNet's")
    roi = preprocessing["roi"]
    spec = PreprocessSpec(
        width=geometry.image_width,
        height=geometry.image_height,
        roi=None if roi is None else FrameArea(**roi),
        dark=_read_array(blobs, preprocessing["dark_frame"]),
        flat=_read_array(blobs, preprocessing["flat_field"]),
        ignore=_read_mask(blobs, preprocessing["ignore_mask"]),
    )
    path = folder / str(manifest["files"][WEIGHTS].get("file", WEIGHTS))
    try:
        weights = load_tensors(blobs[WEIGHTS])
    except SafetensorError as error:
        raise BundleError(f"{path.absolute()}: {error}") from error
    except KeyError as error:  # of a type that NumPy does not have
        raise BundleError(f"{path.absolute()}: a tensor is {error.args[0]}, not float32") from error
    expects = any(name.startswith("expected.") for name in weights)
    _check_weights(weights, weight_shapes(size, geometry, expects=expects), path)
    calibration = dict(manifest["calibration"])
    threshold = float(calibration["threshold"])
    if not np.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}")
    return Bundle(
        model=Model(size, geometry, spec, weights, _read_ranges(manifest.get("int8", {}))),
        quantiles=Quantiles.from_json(calibration["quantiles"]),
        threshold=threshold,
        precisions=_read_precisions(manifest.get("precisions", [])),
        teacher=manifest["teacher"],
        calibration=calibration,
        training=manifest["training"],
        versions=manifest["versions"],
        created=manifest["created"],
        model_id=manifest["model_id"],
        calibration_id=manifest["calibration_id"],
    )


def _read_ranges(data: dict[str, Any]) -> dict[str, float]:
    """Read the activation ranges; none where int8 was calibrated with another int8 than ours."""
    if any(data.get(name) != value for name, value in INT8_SCHEME.items()):
        return {}
    ranges = {str(name): float(value) for name, value in data["activation_ranges"].items()}
    if not all(np.isfinite(value) and value >= 0 for value in ranges.values()):
        raise ValueError("an activation range is not finite, or negative")
    return ranges


def _read_precisions(data: list[dict[str, Any]]) -> dict[Precision, PrecisionCalibration]:
    unknown = {each["precision"] for each in data} - set(get_args(Precision))
    if unknown:
        raise ValueError(f"precisions {', '.join(sorted(unknown))} are not known")
    return {each["precision"]: PrecisionCalibration.from_json(each) for each in data}


def _check_weights(
    weights: Mapping[str, NDArray[np.float32]], wanted: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    for name, shape in wanted.items():
        if name not in weights:
            raise BundleError(f"{path.absolute()}: tensor {name} is missing")
        found = weights[name]
        if found.shape != shape or found.dtype != np.float32:
            raise BundleError(
                f"{path.absolute()}: tensor {name} is {found.dtype} {found.shape}, not float32 {shape}"
            )
        if not np.isfinite(found).all():
            raise BundleError(f"{path.absolute()}: tensor {name} holds values that are not finite")
    unknown = sorted(set(weights) - set(wanted))
    if unknown:
        raise BundleError(f"{path.absolute()}: unknown tensors {', '.join(unknown[:5])}")


def _read_file(folder: Path, name: str, facts: dict[str, Any]) -> bytes:
    file = str(facts.get("file", name))
    if not _PART.fullmatch(file):
        raise BundleError(f"{folder.absolute()}: the bundle names an unknown file {file!r}")
    path = folder / file
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path.absolute()}: {error.strerror}") from error
    if len(blob) != facts["bytes"]:
        raise BundleError(f"{path.absolute()}: {len(blob)} bytes instead of {facts['bytes']}: truncated?")
    if sha256_hex(blob) != facts["sha256"]:
        raise BundleError(f"{path.absolute()}: SHA-256 does not fit bundle.json: damaged or from another bundle")
    return blob


def _read_array(blobs: Mapping[str, bytes], name: str | None) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    if name is None:
        return None
    array = np.asarray(np.load(io.BytesIO(blobs[name]), allow_pickle=False), np.float32)
    check_correction(array)
    return array


def _read_mask(blobs: Mapping[str, bytes], name: str | None) -> BoolMap | None:
    if name is None:
        return None
    mask = cv2.imdecode(np.frombuffer(blobs[name], np.uint8), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise ValueError(f"{name} is not a PNG")
    return np.asarray(mask > 0)


def write_atomically(path: Path, blob: bytes) -> None:
    """Write a file so that after a crash either the old or the new content is there, never half of it."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # one that cannot be filled does not say so itself
        partial.unlink(missing_ok=True)
        raise


def write_result(path: Path, blob: bytes) -> None:
    """Write what a user wants at a path: atomically, through a link, or into a pipe, a device or /dev/stdout."""
    stream = _STREAM.fullmatch(str(path))
    if stream:  # a file that it was redirected into is neither replaced nor written over
        sys.stdout.flush()
        descriptor = {"stdout": 1, "stderr": 2}.get(stream[1]) or int(stream[2])
        with os.fdopen(os.dup(descriptor), "wb") as output:
            output.write(blob)
    elif path.exists() and not path.is_file():
        path.write_bytes(blob)
    else:
        write_atomically(Path(os.path.realpath(path)), blob)


def check_result(path: Path) -> None:
    """Say before long work that `write_result` could not write to a path. Raises OSError."""
    if not _STREAM.fullmatch(str(path)) and (path.is_file() or not path.exists()):
        check_writable(Path(os.path.realpath(path)).parent)


def check_writable(folder: Path) -> None:
    """Say before long work, not after it, that nothing can be written to a folder. Raises OSError."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder.absolute())) from None


def sha256_hex(blob: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hex digits."""
    return hashlib.sha256(blob).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _read_float(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
