from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from calibrate import pretrain as pretraining
from calibrate.backbone import ResNetFeatures
from calibrate.distill import distill, patchcore_target
from calibrate.layouts import DatasetError, ImageFile
from calibrate.listener import Listener, TrainingError, TrainingStopped
from calibrate.patches import draw_scenes, read_labelled
from calibrate.pretrain import PretrainOptions, fold_batch_norm, pretrain
from calibrate.procedural import FIELDS, MARK_LABELS, PROGRAMS, SHAPES, natural_like, program_labels, scene, texture
from calibrate.teacher import find_teacher, read_teacher, shipped_teachers
from pipeline.networks import pdn


def test_a_scene_follows_from_its_seed_and_its_labels_from_its_picture():
    a, b = (scene(np.random.default_rng([1, 5]), 96) for _ in range(2))
    assert np.array_equal(a.image, b.image)
    assert a.image.shape == (96, 96, 3)
    assert 0 <= a.image.min() < a.image.max() <= 1
    assert a.marks.shape == (MARK_LABELS, 96, 96)
    assert a.program.min() >= 0
    assert a.program.max() < PROGRAMS
    assert not np.array_equal(a.image, scene(np.random.default_rng([1, 6]), 96).image)


def test_every_program_draws_something_and_has_labels():
    for number in range(PROGRAMS):
        plane = texture(np.random.default_rng([2, number]), number, 48)
        assert plane.std() == pytest.approx(1, abs=1e-3), number
        field, shape, parameters = program_labels(number)
        assert 0 <= field < len(FIELDS)
        assert 0 <= shape < len(SHAPES)
        assert np.abs(parameters).max() < 3


def test_a_patch_and_its_labels_belong_together():
    scenes = draw_scenes(12, seed=4)
    patches, labels = scenes.draw(np.random.default_rng(0), 40)
    again = draw_scenes(12, seed=4)
    assert np.array_equal(scenes.images, again.images)
    assert patches.shape == (40, 33, 33, 3)
    rng = np.random.default_rng(0)
    which = rng.integers(12, size=40)
    top, left = rng.integers(17, size=(2, 40))
    for i in range(40):
        drawn = scene(np.random.default_rng([4, int(which[i])]), 49)
        window = drawn.image[top[i] : top[i] + 33, left[i] : left[i] + 33]
        np.testing.assert_allclose(patches[i], window, atol=0.5 / 255 + 1e-6)
        y, x = top[i] + 16, left[i] + 16
        assert labels.field[i] == program_labels(int(drawn.program[y, x]))[0]
        near = drawn.marks[:, max(0, y - 3) : y + 4, max(0, x - 3) : x + 4].any(axis=(1, 2))
        assert np.array_equal(labels.marks[i, :-1] > 0, near)
        around = drawn.region[y - 4 : y + 5, x - 4 : x + 5]
        assert labels.marks[i, -1] == float(around.min() != around.max())


def test_procedural_images_for_the_penalty():
    image = natural_like(np.random.default_rng(1), 64)
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8


def test_batch_normalisation_folds_exactly():
    torch.manual_seed(0)
    layers = []
    for layer in pdn("small", 384, padded=False):
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            norm = nn.BatchNorm2d(layer.out_channels)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
            layers.append(norm)
    network = nn.Sequential(*layers).eval()
    x = torch.randn(2, 3, 40, 44)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(network, "small")(x), network(x), rtol=1e-3, atol=1e-4)


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 60), ("light", 190)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            image = np.clip(rng.normal(level, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "photos" / name / f"{i}.png"), image)
    return tmp_path / "photos"


@pytest.mark.parametrize("target", ["procedural", "photographs"])
def test_a_teacher_is_made_from_its_seed(tmp_path, photographs, target, monkeypatch):
    monkeypatch.setattr(pretraining, "_WHITENING_BATCHES", 20)
    options = PretrainOptions(
        tmp_path / "a-small.safetensors",
        target=target,
        steps=2,
        scenes=100,
        precision="fp32",
        images=photographs if target == "photographs" else None,
    )
    digest = pretrain(options)
    teacher = read_teacher(options.out)
    assert teacher.facts["sha256"] == digest
    assert teacher.facts["name"] == "a"
    assert (teacher.facts["steps"], teacher.facts["seed"]) == (2, 0)
    assert ("photos" in teacher.facts["origin"]) == (target == "photographs")
    pretrain(replace(options, out=tmp_path / "b-small.safetensors"))
    for name, tensor in read_teacher(tmp_path / "b-small.safetensors").weights.items():
        torch.testing.assert_close(tensor, teacher.weights[name], rtol=2e-2, atol=2e-3)
    network = pdn("small", 384, padded=False)
    network.load_state_dict(teacher.weights)
    scenes = draw_scenes(100, 0)
    patches, _ = scenes.draw(np.random.default_rng(3), 600)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    x = torch.from_numpy(((patches - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        features = network(x)[:, :, 0, 0].double().numpy()
    covariance = np.cov(features.T)
    off = covariance - np.diag(np.diag(covariance))
    assert np.abs(off).mean() < 0.25 * np.diag(covariance).mean(), "whitened, as far as two steps allow"


class Stopping(Listener):
    def should_stop(self):
        return True


def test_pretraining_stops_while_drawing(tmp_path):
    with pytest.raises(TrainingStopped, match="stopped at scene 1; nothing was written"):
        pretrain(PretrainOptions(tmp_path / "t.safetensors", scenes=400), Stopping())
    assert list(tmp_path.iterdir()) == []


def test_labelled_photographs_from_an_npz_and_from_folders(tmp_path, photographs):
    found = read_labelled(photographs)
    assert (found.images.shape, found.classes) == ((12, 32, 32, 3), 2)
    files = [cv2.imencode(".jpg", image[..., ::-1])[1].ravel() for image in found.images]
    offsets = np.concatenate([[0], np.cumsum([len(f) for f in files])])
    np.savez(tmp_path / "c.npz", jpeg=np.concatenate(files), offsets=offsets, labels=found.labels)
    again = read_labelled(tmp_path / "c.npz")
    assert np.array_equal(again.labels, found.labels)
    assert np.abs(again.images.astype(int) - found.images).mean() < 12
    patches, labels = again.draw(np.random.default_rng(0), 50)
    assert patches.shape == (50, 33, 33, 3)
    assert patches[labels == 0].mean() < patches[labels == 1].mean()
    np.savez(tmp_path / "d.npz", jpeg=np.zeros(9, np.uint8))
    with pytest.raises(DatasetError, match=r"d\.npz: not an \.npz with jpeg, offsets and labels"):
        read_labelled(tmp_path / "d.npz")
    pixels = np.concatenate(files)
    for facts, message in (
        ({"offsets": offsets, "labels": np.append(found.labels, 0)}, "13 labels from 0 on for 12 images"),
        ({"offsets": offsets[:1], "labels": found.labels[:0]}, "0 labels from 0 on for 0 images"),
        ({"offsets": offsets, "labels": found.labels - 1}, "12 labels from 0 on for 12 images"),
        ({"offsets": np.append(offsets, offsets[-1]), "labels": np.append(found.labels, 0)}, "image 12 cannot be"),
    ):
        np.savez(tmp_path / "e.npz", jpeg=pixels, **facts)
        with pytest.raises(DatasetError, match=message):
            read_labelled(tmp_path / "e.npz")
    with pytest.raises(DatasetError, match="one for each class"):
        read_labelled(photographs / "dark")


def test_what_a_target_needs_is_said(tmp_path):
    (tmp_path / "there.safetensors").write_text("")
    for options, message in (
        (PretrainOptions(tmp_path), "is a folder; name a file"),
        (PretrainOptions(tmp_path / "there.safetensors"), "add --overwrite"),
        (PretrainOptions(tmp_path / "t.safetensors", images=tmp_path), "takes no photographs"),
        (PretrainOptions(tmp_path / "t.safetensors", backbone=tmp_path), "needs --target backbone"),
    ):
        with pytest.raises(TrainingError, match=message):
            pretrain(options)
    with pytest.raises(TrainingError, match="needs --images"):
        pretrain(PretrainOptions(tmp_path / "t.safetensors", target="photographs"))
    with pytest.raises(TrainingError, match="needs --backbone FILE and --images DIR"):
        pretrain(PretrainOptions(tmp_path / "t.safetensors", target="backbone"))


def adaptive_pool(vector, count):
    """PyTorch's definition of adaptive average pooling, spelt out."""
    size = len(vector)
    bounds = [((i * size) // count, -((-(i + 1) * size) // count)) for i in range(count)]
    return np.array([vector[a:b].mean() for a, b in bounds])


def test_patchcores_target_cell_by_cell():
    rng = np.random.default_rng(0)
    fine, coarse = rng.normal(size=(1, 20, 6, 6)), rng.normal(size=(1, 30, 3, 3))
    got = patchcore_target([torch.tensor(fine), torch.tensor(coarse)], channels=384)[0].numpy()
    assert got.shape == (384, 6, 6)

    def pooled(layer):
        channels, height, width = layer.shape
        padded = np.pad(layer, ((0, 0), (1, 1), (1, 1)))
        out = np.empty((1024, height, width))
        for y in range(height):
            for x in range(width):
                out[:, y, x] = adaptive_pool(padded[:, y : y + 3, x : x + 3].reshape(channels, 9).ravel(), 1024)
        return out

    stretched = F.interpolate(torch.tensor(pooled(coarse[0]))[None], size=(6, 6), mode="bilinear")[0].numpy()
    together = np.concatenate([pooled(fine[0]), stretched])
    np.testing.assert_allclose(got[:, 2, 4], adaptive_pool(together[:, 2, 4], 384), atol=1e-12)
    np.testing.assert_allclose(got[:, 0, 0], adaptive_pool(together[:, 0, 0], 384), atol=1e-12)


class SmallExtractor(nn.Module):
    """Stands in for a pretrained backbone: two fixed random layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 2, stride=2)

    def forward(self, x):
        first = torch.relu(self.a(x))
        return [first, torch.relu(self.b(first))]


def test_distillation_learns_any_modules_features(tmp_path, photographs):
    from drivers.replay import list_images

    images = [ImageFile(*pair) for pair in list_images(photographs)]
    losses = []
    network = distill(
        SmallExtractor(), images, "small", seed=0, steps=8, batch=1, statistics_batches=3, backbone_px=128,
        on_step=lambda _step, values: losses.append(values["distillation"]),
    )  # fmt: skip
    assert len(losses) == 8
    assert np.mean(losses[-3:]) < losses[0]
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 256, 256)).shape == (1, 384, 56, 56)


def resnet_state(stem=8, widths=(4, 6, 8), blocks=(2, 1, 2)):
    """Random weights under torchvision's names for a small bottleneck ResNet."""
    g = torch.Generator().manual_seed(0)
    state = {"conv1.weight": torch.randn(stem, 3, 7, 7, generator=g) * 0.1, "fc.weight": torch.zeros(10, 32)}

    def norm(name, n):
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.ones(n), torch.zeros(n)
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.zeros(n), torch.ones(n)
        state[f"{name}.num_batches_tracked"] = torch.tensor(0)

    norm("bn1", stem)
    channels = stem
    for layer, (width, count) in enumerate(zip(widths, blocks, strict=True), start=1):
        for block in range(count):
            name, out = f"layer{layer}.{block}", 4 * width
            shapes = ((width, channels, 1), (width, width, 3), (out, width, 1))
            for index, (o, i, k) in enumerate(shapes, start=1):
                state[f"{name}.conv{index}.weight"] = torch.randn(o, i, k, k, generator=g) * 0.2
                norm(f"{name}.bn{index}", o)
            if block == 0:
                state[f"{name}.downsample.0.weight"] = torch.randn(out, channels, 1, 1, generator=g) * 0.2
                norm(f"{name}.downsample.1", out)
            channels = out
    return state


def test_a_resnet_is_built_from_its_state_dict():
    state = resnet_state()
    second, third = ResNetFeatures(state)(torch.randn(1, 3, 64, 64))
    assert second.shape == (1, 24, 8, 8)
    assert third.shape == (1, 32, 4, 4)
    del state["layer2.0.bn2.running_var"]
    with pytest.raises(ValueError, match="not the state dict of a bottleneck ResNet"):
        ResNetFeatures(state)


def test_pretraining_from_a_backbone_file(tmp_path, photographs, monkeypatch):
    torch.save(resnet_state(), tmp_path / "backbone.pth")
    monkeypatch.setattr("calibrate.distill.distill.__kwdefaults__", {
        "steps": 1, "batch": 1, "statistics_batches": 1, "backbone_px": 64, "device": None,
        "on_step": None, "on_statistics": None,
    })  # fmt: skip
    options = PretrainOptions(
        tmp_path / "d-small.safetensors",
        target="backbone",
        images=photographs,
        backbone=tmp_path / "backbone.pth",
        steps=1,
    )
    pretrain(options)
    assert "distilled from backbone.pth on photos" in read_teacher(options.out).facts["origin"]


def test_the_default_teacher_ships_and_random_is_there_by_name():
    assert find_teacher(None, "small", 0).facts["name"] == "procedural"
    assert shipped_teachers("small") == ["procedural", "photographs"], "the default first"
    assert "labelled photographs" in find_teacher("photographs", "small", 0).facts["origin"]
    assert find_teacher("random", "small", 3).facts["seed"] == 3
