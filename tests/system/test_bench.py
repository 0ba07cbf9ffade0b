"""What the benches print and write; never how fast anything is: machines are noisy."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from daemon.bench_engine import Reference, gigamacs, random_networks
from pipeline.engine_cpu import cpu_precisions
from pipeline.geometry import Geometry
from tests.system.test_commands import inspectord

STAGES = ("grab", "queue", "preprocess", "infer", "publish", "overhead", "total")


def run(tmp_path, *arguments):
    done = inspectord("bench", *arguments, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert done.returncode == 0, done.stderr
    assert cv2.imread(str(tmp_path / "b.png")) is not None
    found = json.loads((tmp_path / "b.json").read_text())
    assert {"processor", "cores", "torch"} <= found["machine"].keys()
    return found, done.stdout


def check_stages(result):
    for stage in STAGES:
        values = [result[stage][key] for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms")]
        assert values == sorted(values)
    assert len(result["rss_mib"]) == len(result["descriptors"]) == 11
    assert min(result["rss_mib"]) > 0
    # Sums would not do: a frame that waited in the camera's queue waits less in ours. A subscriber may have a
    # verdict before its publisher looks at the clock.
    for stage in sorted({*STAGES} - {"overhead"}):
        for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms"):
            assert result[stage][key] <= result["total"][key]
    ours = (result[stage]["max_ms"] for stage in ("grab", "queue", "preprocess", "infer"))
    assert max(ours) < result["total"]["max_ms"], "to the subscriber, not to the socket"


@pytest.mark.parametrize(("size", "wanted"), [("small", 38.0), ("medium", 117.7)])
def test_work_is_counted_as_published(size, wanted):
    assert gigamacs(size, Geometry()) == pytest.approx(wanted, abs=0.1)


def test_the_reference_computes_the_maps_that_it_is_timed_for(rng):
    networks = random_networks("small", Geometry(128, 128, tile_rows=2))
    image = rng.normal(0, 1, (3, 128, 128)).astype(np.float32)
    with torch.inference_mode():
        wanted = networks(torch.from_numpy(image)[None])
    for ours, theirs in zip(Reference(networks, "cpu")(image), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-4, atol=1e-6)


def test_engines_beside_the_reference(tmp_path):
    found, said = run(
        tmp_path,
        *("engine", "--size", "small", "--seconds", "0.1", "--image-size", "64x64", "--threads", "1"),
        *("--frame", "128x96", "--pixel-format", "BGR8"),
    )
    results = found["results"]
    assert [(r["engine"], r["precision"]) for r in results] == [
        ("reference", "fp32"),
        *(("cpu", precision) for precision in cpu_precisions()),
    ]
    assert results[0]["ratio_to_reference"] == 1.0
    for r in results:
        assert 0 < r["p10_ms"] <= r["median_ms"] <= r["p90_ms"] <= r["p99_ms"]
        taken = None if r["engine"] == "reference" else {"width": 128, "height": 96, "pixel_format": "BGR8"}
        assert r["frame"] == taken
        assert (r["saturated_fps"] is None) if taken is None else (r["saturated_fps"] > 0)
        assert r["ratio_to_reference"] == pytest.approx(results[0]["median_ms"] / r["median_ms"])
        assert r["peak_memory_mib"] > 50
        assert r["limit_ms"] > 0
        fewer = r["engine"] == "cpu" and r["precision"] == "fp32"
        assert (r["gmac_computed"] < r["gmac"]) if fewer else (r["gmac_computed"] == r["gmac"])
    assert "ratio to reference" in said


def test_a_station_by_stage_at_a_load_and_saturated(tmp_path, tiny_bundle):
    found, _ = run(
        tmp_path,
        *("pipeline", "--model", tiny_bundle, "--camera-size", "128x96", "--pixel-format", "BGR8"),
        *("--frames", "20", "--load-fps", "40"),
    )
    loaded, saturated = found["results"]
    assert (loaded["load_fps"], loaded["saturated"], saturated["saturated"]) == (40.0, False, True)
    assert sum(loaded["outcomes"].values()) == sum(saturated["outcomes"].values()) == 20
    assert saturated["load_fps"] == saturated["rate_fps"]
    check_stages(loaded)
    check_stages(saturated)


def test_everything_but_the_engine(tmp_path):
    pytest.importorskip("pypylon", reason="pypylon is not installed: pip install 'inspectord[pylon]'")
    found, _ = run(tmp_path, "ingest", "--frames", "200", "--camera-size", "320x240", "--rounds", "2")
    by_name = {result["with"]: result for result in found["results"]}
    *loaded, saturated = by_name.values()
    assert saturated["saturated"]
    assert {result["load_fps"] for result in loaded} == {100.0}
    for name, result in by_name.items():
        judged = {word for word in result["outcomes"] if not word.startswith("INVALID")}
        assert judged == {"NG" if name == "journal, regions" else "OK"}
        assert result["verdicts"] == 200
        assert sum(result["outcomes"].values()) == result["verdicts"]
        assert result["unjournaled"] == (200 if name == "nothing" else 0)
        assert len(result["rounds_p50_ms"]) == (1 if name == "journal, saturated" else 2)
        assert result["total"]["p50_ms"] == pytest.approx(np.median(result["rounds_p50_ms"]))
        assert (result["maps"] > 0) == (name == "journal, maps")
        assert result["infer"]["max_ms"] == 0.0
        check_stages(result)


def test_image_sizes_tiles_and_stations(tmp_path, tiny_bundle):
    found, _ = run(
        tmp_path,
        *("scaling", "--image-size", "64x64", "--image-size", "128x64", "--seconds", "0.1"),
        *("--stations", "2", "--frames", "10", "--model", tiny_bundle),
    )
    sizes = [(r["image_size"], r["tiles"]) for r in found["results"] if r["kind"] == "image_size"]
    assert sizes == [([64, 64], [1, 1]), ([64, 64], [2, 2]), ([128, 64], [1, 1]), ([128, 64], [2, 2])]
    assert [r["stations"] for r in found["results"] if r["kind"] == "stations"] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("engine", "--size", "huge"), "'huge' is not one of small, medium"),
        (("engine", "--tiles", "20x20", "--seconds", "0.1"), "too many"),
        (("engine", "--frame", "0x0"), "at least 3 px"),
        (("pipeline", "--model", "/nowhere"), "/nowhere"),
        (("pipeline", "--load-fps", "0"), "--load-fps"),
        (("pipeline", "--load-fps", "5", "--load-fps", "5"), "given twice"),
        (("pipeline", "--precision", "fp16", "--device", "cpu"), "does not compute in fp16"),
        (("ingest", "--json", "/nowhere/b.json"), "no folder /nowhere"),
        (("scaling", "--plot", "/nowhere/b.png"), "no folder /nowhere"),
    ],
)
def test_bad_options_are_said(arguments, message):
    done = inspectord("bench", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
