from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import bundle as bundle_module
from pipeline.bundle import MANIFEST, WEIGHTS, BundleError, read_bundle, write_bundle
from pipeline.preprocess import PreprocessSpec
from pipeline.scoring import FrameArea


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


def edit_manifest(folder, change):
    """Change the manifest and make its checksum fit again, as a foreign writer would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("checksum")
    change(manifest)
    manifest["checksum"] = bundle_module.sha256_hex(bundle_module._canonical(manifest))
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_is_written_is_what_is_read(tiny_bundle, tmp_path, rng):
    bundle = read_bundle(tiny_bundle)
    spec = PreprocessSpec(
        64,
        64,
        roi=FrameArea(1, 2, 30, 40),
        dark=rng.random((50, 60)).astype(np.float32),
        flat=rng.random((50, 60)).astype(np.float32),
        ignore=rng.random((50, 60)) < 0.2,
    )
    written = write_bundle(replace(bundle, model=replace(bundle.model, preprocess=spec)), tmp_path / "b")
    read = read_bundle(tmp_path / "b")
    assert read.model.preprocess.roi == spec.roi
    for name in ("dark", "flat", "ignore"):
        np.testing.assert_array_equal(getattr(read.model.preprocess, name), getattr(spec, name))
    assert (read.quantiles, read.threshold) == (bundle.quantiles, bundle.threshold)
    assert all(np.array_equal(read.model.weights[k], v) for k, v in bundle.model.weights.items())
    assert written.model_id == bundle.model_id, "same weights, same model"
    assert written.calibration_id != bundle.calibration_id, "other preprocessing, other calibration"


RANGES = {"activation_ranges": {"teacher.3": 1.0}}


@pytest.mark.parametrize(
    "found",
    [
        None,
        {"largest_weight": 127, "image": "float", **RANGES},
        pytest.param({"largest_weight": 64, **RANGES}, id="the image in integers, too"),
    ],
)
def test_int8_of_another_version_is_not_used(copy, found):
    assert read_bundle(copy).model.ranges

    def older(manifest):
        if found is None:
            del manifest["int8"]
        else:
            manifest["int8"] = found

    edit_manifest(copy, older)
    assert read_bundle(copy).model.ranges == {}


def test_a_bundle_replaces_another_whole_or_not_at_all(tiny_bundle, copy, monkeypatch):
    before = read_bundle(copy)
    changed = {name: array + 1 for name, array in before.model.weights.items()}
    after = replace(before, model=replace(before.model, weights=changed), threshold=before.threshold + 1)
    whole = bundle_module.write_atomically

    def disk_full(path, blob):
        if path.name == MANIFEST:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        whole(path, blob)

    with monkeypatch.context() as patch:
        patch.setattr(bundle_module, "write_atomically", disk_full)
        with pytest.raises(OSError, match="No space left"):
            write_bundle(after, copy)
    assert read_bundle(copy).model_id == before.model_id
    for wanted in (after, before, after):
        written = write_bundle(wanted, copy)
        assert written.threshold == read_bundle(copy).threshold == wanted.threshold
        assert np.array_equal(written.model.weights["teacher_mean"], wanted.model.weights["teacher_mean"])
        assert len(list(copy.glob("weights*"))) == 1, "what is no longer named is gone"
    assert write_bundle(before, copy).calibration_id == before.calibration_id, "whatever its files are called"


def test_links_are_followed_and_pipes_written_to(tmp_path):
    there, link, pipe = tmp_path / "there", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(there)
    bundle_module.write_result(link, b"linked")
    assert link.is_symlink()
    assert there.read_bytes() == b"linked"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_bytes)
        bundle_module.write_result(pipe, b"piped")
        assert read.result(timeout=30) == b"piped"
    assert pipe.is_fifo()
    with (tmp_path / "output").open("w+") as output:
        print("said before", file=output, flush=True)
        bundle_module.write_result(Path(f"/dev/fd/{output.fileno()}"), b"result")
        print("said after", file=output, flush=True)
        output.seek(0)
        assert output.read() == "said before\nresultsaid after\n", "a redirected /dev/stdout is not replaced"


def test_a_folder_that_takes_no_files_is_told(tmp_path):
    bundle_module.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="'/proc'"):
        bundle_module.check_writable(Path("/proc"))


def test_what_is_not_ours_stays(tiny_bundle, tmp_path, rng):
    bundle = read_bundle(tiny_bundle)
    mine = {"flat_field.npy": b"raw values of mine", "ignore_mask.png": b"the mask that training was given"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    for name in ("weights-0123456789ab.safetensors.partial", "weights-ba9876543210.safetensors"):
        (tmp_path / name).write_bytes(b"of a run that was killed")
    spec = replace(bundle.model.preprocess, ignore=rng.random((50, 60)) < 0.2)
    for _ in range(2):
        write_bundle(replace(bundle, model=replace(bundle.model, preprocess=spec)), tmp_path)
        np.testing.assert_array_equal(read_bundle(tmp_path).model.preprocess.ignore, spec.ignore)
    assert {name: (tmp_path / name).read_bytes() for name in mine} == mine
    assert not list(tmp_path.glob("*.partial"))
    assert [path.name for path in tmp_path.glob("weights*")] == [WEIGHTS]


def test_a_bundle_that_is_replaced_meanwhile_is_read_as_the_one_or_the_other(tiny_bundle, copy):
    before = read_bundle(copy)
    changed = {name: array + 1 for name, array in before.model.weights.items()}
    both = [before, replace(before, model=replace(before.model, weights=changed))]
    done = threading.Event()

    def swap():
        for turn in range(20):
            write_bundle(both[turn % 2], copy)
        done.set()

    writer = threading.Thread(target=swap)
    writer.start()
    seen = set()
    while not done.is_set():
        seen.add(read_bundle(copy).model_id)
    writer.join()
    assert seen <= {before.model_id, read_bundle(copy).model_id}


def test_manifest_is_readable_and_complete(tiny_bundle):
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    assert manifest["architecture"]["geometry"]["map_width"] == 8
    assert manifest["architecture"]["geometry"]["padding_cells"] == 4
    assert manifest["calibration"]["quantile_levels"] == [0.9, 0.995]
    assert len(manifest["training"]["fingerprint"]) == 64
    assert set(manifest["versions"]) >= {"inspectord", "torch"}


def test_truncated_weights_are_refused(copy):
    blob = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(blob[: len(blob) // 2])
    with pytest.raises(BundleError, match=r"weights\.safetensors: \d+ bytes instead of \d+: truncated"):
        read_bundle(copy)


def test_damaged_weights_are_refused(copy):
    blob = bytearray((copy / WEIGHTS).read_bytes())
    blob[len(blob) // 2] ^= 1
    (copy / WEIGHTS).write_bytes(blob)
    with pytest.raises(BundleError, match="SHA-256 does not fit"):
        read_bundle(copy)


def test_truncated_manifest_is_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text[: len(text) // 2])
    with pytest.raises(BundleError, match="not valid JSON, damaged or truncated"):
        read_bundle(copy)


def test_foreign_bundle_is_refused(copy):
    (copy / MANIFEST).write_text('{"format": "anomalib/2", "model": "efficient_ad"}')
    with pytest.raises(BundleError, match=r"format is 'anomalib/2', this version reads 'inspectord\.bundle/1'"):
        read_bundle(copy)


def test_manifest_edited_by_hand_is_refused_and_says_where_to_set_a_threshold(copy):
    text = (copy / MANIFEST).read_text()
    manifest = json.loads(text)
    manifest["calibration"]["threshold"] = 99.0
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"edited by hand .*configuration"):
        read_bundle(copy)


def test_missing_folder_and_missing_weights(tmp_path, copy):
    with pytest.raises(BundleError, match="no such file"):
        read_bundle(tmp_path / "nowhere")
    (copy / WEIGHTS).unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors: No such file"):
        read_bundle(copy)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', "[" * 100_000, '{"format": "inspectord.bundle/1", "x": Infinity}', '{"x": 1e999}']
)
def test_manifests_that_are_no_strict_json_are_refused(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="not valid JSON"):
        read_bundle(copy)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a bundle was unpickled",))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_nothing_is_ever_unpickled(copy, name):
    blob = pickle.dumps(Bomb())
    (copy / name).write_bytes(blob)
    if name == WEIGHTS:
        import hashlib

        facts = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
        edit_manifest(copy, lambda m: m["files"].update({WEIGHTS: facts}))
    with pytest.raises(BundleError):
        read_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../../etc/passwd": {"sha256": "", "bytes": 0}}), "unknown file"),
        (lambda m: m["files"][WEIGHTS].update(file=f"../other/{WEIGHTS}"), "unknown file"),
        (lambda m: m["architecture"]["geometry"].update(map_width=9), "map_width is 9"),
        (lambda m: m["architecture"].update(size="huge"), "EfficientAD huge is not known"),
        (lambda m: m["calibration"].pop("quantiles"), "'quantiles' is missing"),
        (lambda m: m.update(files=[]), "has no attribute"),
        (lambda m: m.update(architecture=None), "not subscriptable"),
        (lambda m: m["calibration"]["quantiles"].update(st_b=-1.0), "must lie above"),
        (lambda m: m["architecture"]["geometry"].update(image_width="64"), "must be integers"),
        (lambda m: m["calibration"].update(threshold=10**400), "too large"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(BundleError, match=message):
        read_bundle(copy)


@pytest.mark.parametrize("kind", ["missing", "shape", "float16", "bfloat16", "nan", "half"])
def test_weights_that_do_not_fit_are_refused(copy, kind):
    import hashlib

    weights = load_file(copy / WEIGHTS)
    if kind == "missing":
        del weights["student.0.weight"]
    elif kind == "half":
        weights["expected.bias"] = torch.zeros(1)
    elif kind == "shape":
        weights["student.0.weight"] = torch.zeros(1)
    elif kind in ("float16", "bfloat16"):
        weights["student.0.weight"] = weights["student.0.weight"].to(getattr(torch, kind))
    else:
        weights["student.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, copy / WEIGHTS)
    blob = (copy / WEIGHTS).read_bytes()
    facts = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    edit_manifest(copy, lambda m: m["files"].update({WEIGHTS: facts}))
    said = {"bfloat16": "a tensor is BF16, not float32", "half": r"tensor expected\.weight is missing"}
    with pytest.raises(BundleError, match=rf"weights\.safetensors: .*{said.get(kind, r'student.0.weight')}"):
        read_bundle(copy)
