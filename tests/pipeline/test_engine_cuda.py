from __future__ import annotations

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from drivers.frame import PixelFormat
from pipeline.bundle import Model
from pipeline.engines import EngineUnavailable, frame_memory, make_float_engine
from pipeline.folded import fold
from pipeline.folded_networks import FoldedEfficientAD
from pipeline.geometry import Geometry
from pipeline.networks import weights_of
from pipeline.preprocess import Preprocessor, PreprocessSpec
from tests.pipeline.fake_cuda import CaptureBroken, Mixed, Race
from tests.pipeline.test_networks import seeded_model

GEOMETRIES = [Geometry(), Geometry(padded=True), Geometry(320, 384, tile_rows=2, tile_columns=2)]
SMALL = [Geometry(64, 64), Geometry(64, 64, padded=True), Geometry(96, 128, tile_rows=2, tile_columns=2)]


ON_A_GPU = [pytest.param(precision, marks=pytest.mark.gpu) for precision in ("fp32", "fp16")]


@pytest.fixture(params=["not there", *ON_A_GPU])
def trial(request):
    """A geometry and a precision to try on a GPU, and small ones for a device that is not there."""
    if request.param != "not there":
        return Geometry(), request.param
    request.getfixturevalue("fake_cuda")
    return SMALL[0], "fp32"


def model_and_engine(precision="fp32", size="small", geometry=None, seed=0, *, expects=False):
    from pipeline.engine_cuda import CudaEngine

    networks = seeded_model(size, geometry or Geometry(), seed, expects=expects)
    g = networks.geometry
    model = Model(size, g, PreprocessSpec(g.image_width, g.image_height), weights_of(networks))
    engine = CudaEngine(model, precision)
    engine.warm_up()
    return networks, Preprocessor(model.preprocess), engine


def maps_on_cpu(networks, prepared):
    with torch.inference_mode():
        return [maps[0].numpy() for maps in networks(torch.from_numpy(prepared)[None])]


def check_maps(found, wanted, precision):
    for ours, theirs in zip(found, wanted, strict=True):
        if precision == "fp32":
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
        else:  # what a hundredth of the quantiles' distance is
            low, high = np.quantile(theirs, (0.9, 0.995))
            assert np.abs(ours - theirs).max() < 1e-2 * (high - low) + 1e-2 * np.abs(theirs).max()


def check_frames_at_once(networks, preprocess, cuda, precision, rng, count=7):
    frames = [rng.integers(0, 256, (300, 400)).astype(np.uint8) for _ in range(7)]
    frames = [frames[index % 7] for index in range(count)]
    wanted = {id(frame): maps_on_cpu(networks, preprocess(frame, PixelFormat.BAYER_RG8)) for frame in frames}
    waiting = []
    for frame in [*frames, *[None] * cuda.at_once]:
        if frame is None or len(waiting) == cuda.at_once:
            begun, finish = waiting.pop(0)
            found = finish()
            check_maps((found.student_teacher, found.autoencoder), wanted[id(begun)], precision)
        if frame is not None:
            waiting.append((frame, cuda.begin(frame, PixelFormat.BAYER_RG8)))
    assert waiting == []


def test_a_strong_anomaly_fits_into_the_maps_of_float16(rng):
    networks = seeded_model(geometry=Geometry(64, 64), expects=True)
    folded = FoldedEfficientAD(fold("small", networks.geometry, weights_of(networks))).half()
    (tile,) = folded.geometry.tiles()
    cells = (folded.geometry.map_height, folded.geometry.map_width)
    before_last = (cells[0] + 3, cells[1] + 3)
    features = [torch.full((1, 256, *before_last), value, dtype=torch.float16) for value in (40.0, 1.0)]
    predicted = torch.full((1, 384, *cells), 3000.0, dtype=torch.float16)
    with torch.inference_mode():
        st, ae = folded.tile_maps(*features, predicted, tile)
        wanted_st, wanted_ae = folded.double().tile_maps(*(f.double() for f in features), predicted.double(), tile)
    assert (st.dtype, ae.dtype) == (torch.float32, torch.float32)
    assert ae.min() > 65504, "more than float16 holds"
    torch.testing.assert_close(st.double(), wanted_st, rtol=1e-2, atol=0)
    torch.testing.assert_close(ae.double(), wanted_ae, rtol=1e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("expects", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("size", "geometry"), [("medium", GEOMETRIES[0]), *(("small", geometry) for geometry in GEOMETRIES)], ids=str
)
def test_the_graph_gives_the_networks_own_maps(size, geometry, precision, expects, rng):
    networks, preprocess, cuda = model_and_engine(precision, size, geometry, expects=expects)
    for fmt in (PixelFormat.BAYER_RG8, PixelFormat.MONO8, PixelFormat.BAYER_RG8):
        image = rng.integers(0, 256, (300, 400)).astype(np.uint8)
        on_cuda = cuda.begin(image, fmt)()
        wanted = maps_on_cpu(networks, preprocess(image, fmt))
        check_maps((on_cuda.student_teacher, on_cuda.autoencoder), wanted, precision)
        assert on_cuda.preprocess_ns > 0
        assert on_cuda.infer_ns > 0
        check_maps(cuda.infer(preprocess(image, fmt)), wanted, precision)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_frames_are_taken_from_page_locked_memory_and_from_any_other(device, rng):
    networks, preprocess, cuda = model_and_engine()
    allocate = frame_memory(device) or (lambda size: np.empty(size, np.uint8))
    memory = allocate(300 * 400)
    assert torch.from_numpy(memory).is_pinned() == (device == "cuda")
    image = memory.reshape(300, 400)
    for _ in range(3):
        image[:] = rng.integers(0, 256, image.shape)
        found = cuda.begin(image, PixelFormat.MONO8)()
        wanted = maps_on_cpu(networks, preprocess(image, PixelFormat.MONO8))
        check_maps((found.student_teacher, found.autoencoder), wanted, "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_frames_at_once_keep_their_own_maps(precision, rng):
    check_frames_at_once(*model_and_engine(precision), precision, rng, 50)


@pytest.mark.parametrize(("geometry", "expects"), [*zip(SMALL, (True, False, True), strict=True)], ids=str)
def test_on_a_device_that_is_not_there_frames_at_once_keep_their_own_maps(geometry, expects, rng, fake_cuda):
    check_frames_at_once(*model_and_engine(geometry=geometry, expects=expects), "fp32", rng)


def test_a_device_that_is_not_there_notices_each_wait_that_is_left_out(rng, fake_cuda):
    def use():
        _, preprocess, cuda = model_and_engine(geometry=SMALL[0])
        for _ in range(2):
            frames = [rng.integers(0, 256, (300, 400)).astype(np.uint8) for _ in range(cuda.at_once)]
            for finish in [cuda.begin(frame, PixelFormat.BAYER_RG8) for frame in frames]:
                finish()
        cuda.infer(preprocess(frames[0], PixelFormat.BAYER_RG8))

    use()
    waits = sorted(fake_cuda.waits)
    assert len(waits) == 9, waits
    for wait in waits:
        fake_cuda.left_out = wait
        with pytest.raises((Race, CaptureBroken)):
            use()
        fake_cuda.forget()
    fake_cuda.left_out = None
    use()


def test_a_device_that_is_not_there_notices_what_ends_a_capture_and_what_is_not_its_own(fake_cuda):
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    numbers, pinned = torch.zeros(3, device="cuda"), torch.zeros(3, pin_memory=True)
    torch.cuda.current_stream().synchronize()

    def capture(work, match):
        graph = torch.cuda.CUDAGraph()
        with (
            pytest.raises(CaptureBroken, match=match),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            work()

    def on_another_stream(*, fork):
        if fork:
            other.wait_stream(stream)
        with torch.cuda.stream(other):
            numbers.add_(1)

    capture(lambda: numbers.sum().item(), "has the process touch memory")
    capture(lambda: pinned.fill_(1), "has the process touch memory")
    capture(stream.synchronize, "the process cannot wait")
    capture(lambda: on_another_stream(fork=False), "waits for nothing captured")
    capture(lambda: on_another_stream(fork=True), "was not waited for at the end")
    with pytest.raises(Mixed):
        numbers.add_(torch.ones(3))


def test_engines_of_two_bundles_keep_their_own_maps(rng, trial):
    geometry, precision = trial
    both = [model_and_engine(precision, geometry=geometry, seed=seed) for seed in (0, 1)]
    for _ in range(3):
        image = rng.integers(0, 256, (256, 256)).astype(np.uint8)
        for networks, preprocess, cuda in both:
            found = cuda.begin(image, PixelFormat.MONO8)()
            wanted = maps_on_cpu(networks, preprocess(image, PixelFormat.MONO8))
            check_maps((found.student_teacher, found.autoencoder), wanted, precision)
    del both[0]
    (networks, preprocess, cuda) = both[0]
    image = rng.integers(0, 256, (256, 256)).astype(np.uint8)
    found = cuda.begin(image, PixelFormat.MONO8)()
    check_maps(
        (found.student_teacher, found.autoencoder),
        maps_on_cpu(networks, preprocess(image, PixelFormat.MONO8)),
        precision,
    )


def test_an_engine_is_captured_while_another_one_judges(rng, trial):
    geometry, precision = trial
    networks, preprocess, cuda = model_and_engine(geometry=geometry)
    image = rng.integers(0, 256, (256, 256)).astype(np.uint8)
    wanted = maps_on_cpu(networks, preprocess(image, PixelFormat.MONO8))
    made = []
    other = threading.Thread(target=lambda: made.append(model_and_engine(precision, geometry=geometry, seed=1)))
    other.start()
    judged = 0
    while other.is_alive() or not judged:
        found = cuda.begin(image, PixelFormat.MONO8)()
        check_maps((found.student_teacher, found.autoencoder), wanted, "fp32")
        judged += 1
    other.join()
    ((networks, preprocess, cuda),) = made
    found = cuda.begin(image, PixelFormat.MONO8)()
    wanted = maps_on_cpu(networks, preprocess(image, PixelFormat.MONO8))
    check_maps((found.student_teacher, found.autoencoder), wanted, precision)


def test_engines_one_after_the_other_share_streams_and_two_at_once_do_not(fake_cuda):
    _, _, first = model_and_engine(geometry=SMALL[0])
    used = []
    for _ in range(2):
        _, _, refused = model_and_engine(geometry=SMALL[0])
        used.append({lane._stream for lane in refused._lanes})
        del refused
        gc.collect()
    assert used[0] == used[1]
    assert used[0].isdisjoint(lane._stream for lane in first._lanes)


def test_a_capture_that_hangs_is_given_up(fake_cuda, monkeypatch):
    from pipeline import engine_cuda

    let_go = threading.Event()
    monkeypatch.setattr(engine_cuda, "_CAPTURED_WITHIN_S", 0.05)
    monkeypatch.setattr(engine_cuda._Lane, "_capture", lambda _lane: let_go.wait(60))
    with pytest.raises(TimeoutError, match=r"no CUDA graph was captured within 0\.05 s: the GPU hangs"):
        model_and_engine(geometry=SMALL[0])
    let_go.set()


def test_a_kernel_that_cannot_be_compiled_says_what_is_missing(fake_cuda, monkeypatch):
    monkeypatch.setattr("pipeline.engines.resolve_device", lambda _wanted: (True, "configured"))
    fake_cuda.compiler_fails = True
    networks = seeded_model(geometry=SMALL[0])
    model = Model("small", SMALL[0], PreprocessSpec(64, 64), weights_of(networks))
    with pytest.raises(EngineUnavailable, match=r"cannot be compiled: Failed to find CUDA headers\. CuPy needs"):
        make_float_engine(model, "cuda")


_BROKEN = """
import cupy, numpy as np
from drivers.frame import PixelFormat
from tests.pipeline.test_engine_cuda import model_and_engine
_, _, cuda = model_and_engine()
image = np.zeros((256, 256), np.uint8)
cuda.begin(image, PixelFormat.MONO8)()
cupy.RawKernel('extern "C" __global__ void broken(int* at) { *at = 1; }', "broken")((1,), (1,), (np.uintp(8),))
try:
    cupy.cuda.runtime.deviceSynchronize()
except Exception:
    print("the context is lost", flush=True)
for _ in range(3):
    try:
        cuda.begin(image, PixelFormat.MONO8)()
    except Exception as error:
        print("raised", type(error).__name__, flush=True)
    else:
        raise SystemExit("maps of a lost context")
"""


@pytest.mark.gpu
def test_a_lost_context_never_gives_maps():
    done = subprocess.run([sys.executable, "-c", _BROKEN], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.count("raised") == 3, done.stdout + done.stderr
