from __future__ import annotations

import pytest

from calibrate.bench_train import bench_train
from calibrate.listener import Listener
from calibrate.options import TrainOptions
from pipeline.geometry import Geometry
from pipeline.preprocess import PreprocessSpec


def test_both_sides_learn_the_same(good_parts, tmp_path):
    options = TrainOptions(
        dataset=good_parts,
        out=tmp_path,
        teacher="random",
        geometry=Geometry(64, 64),
        preprocess=PreprocessSpec(64, 64),
        precision="fp32",
        device="cpu",
    )
    rounds = []

    class Rounds(Listener):
        def step(self, done, total, losses):
            rounds.append((done, total))

    found = bench_train(options, 3, Rounds())
    assert rounds[-1] == (6, 6)
    reference, ours = found["results"]
    assert ours["mean_loss"] == pytest.approx(reference["mean_loss"], rel=2e-3)
