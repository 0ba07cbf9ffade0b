"""Imports of hand-made files in each foreign format give the map of our own networks with the same numbers."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from calibrate.foreign import ForeignModel, ImportFailed, read_foreign, read_state
from calibrate.importing import import_model
from calibrate.layouts import DatasetError
from calibrate.options import TrainOptions
from calibrate.teacher import FORMAT, SHIPPED, TeacherError, find_teacher, read_teacher, write_teacher
from pipeline.geometry import Geometry
from pipeline.networks import EfficientAD, pdn
from pipeline.preprocess import PreprocessSpec

INDICES = {"small": (0, 3, 6, 8), "medium": (0, 3, 6, 8, 10, 12)}


@pytest.fixture(params=["small", "medium"])
def size(request):
    return request.param


@pytest.fixture
def model(size):
    torch.manual_seed(5)
    model = EfficientAD(size, Geometry(256, 256)).eval()
    model.teacher_mean.normal_()
    model.teacher_std.uniform_(0.5, 2)
    return model


def anomalib_names(model):
    """Write down the state dict that anomalib's EfficientAd saves for these numbers."""
    state = {}
    for part in ("teacher", "student"):
        for number, index in enumerate(INDICES[model.size], start=1):
            for kind in ("weight", "bias"):
                state[f"model.{part}.conv{number}.{kind}"] = getattr(getattr(model, part)[index], kind).data
    convolutions = [layer for layer in model.autoencoder if isinstance(layer, nn.Conv2d)]
    for number, layer in enumerate(convolutions):
        name = f"encoder.enconv{number + 1}" if number < 6 else f"decoder.deconv{number - 5}"
        state[f"model.ae.{name}.weight"], state[f"model.ae.{name}.bias"] = layer.weight.data, layer.bias.data
    state["model.mean_std.mean"] = model.teacher_mean[None, :, None, None]
    state["model.mean_std.std"] = model.teacher_std[None, :, None, None]
    for name in ("qa_st", "qb_st", "qa_ae", "qb_ae"):
        state[f"model.quantiles.{name}"] = torch.tensor(0.5)
    return state


def loaded(foreign, statistics):
    ours = EfficientAD(foreign.size, Geometry(256, 256)).eval()
    ours.load_state_dict(foreign.weights, strict=False)
    ours.teacher_mean.copy_(statistics[0])
    ours.teacher_std.copy_(statistics[1])
    return ours


def assert_same_maps(a, b):
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for one, other in zip(a(image), b(image), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pickled", [False, True])
def test_the_references_folder(model, tmp_path, pickled):
    for part in ("teacher", "student", "autoencoder"):
        network = getattr(model, part)
        torch.save(network if pickled else network.state_dict(), tmp_path / f"{part}_final.pth")
    found = read_foreign(tmp_path)
    assert isinstance(found, ForeignModel)
    assert (found.size, found.statistics) == (model.size, None)
    assert_same_maps(model, loaded(found, (model.teacher_mean, model.teacher_std)))


def test_anomalibs_checkpoint_with_classes_that_are_not_here(model, tmp_path, monkeypatch):
    module = types.ModuleType("anomalib_like")

    class Settings:
        def __init__(self, depth):
            self.depth = depth

    Settings.__module__, Settings.__qualname__ = "anomalib_like", "Settings"
    module.Settings = Settings
    monkeypatch.setitem(sys.modules, "anomalib_like", module)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": OrderedDict(anomalib_names(model)), "hyper_parameters": {"x": Settings(3)}}, path)
    monkeypatch.delitem(sys.modules, "anomalib_like")
    found = read_foreign(path)
    assert found.size == model.size
    assert_same_maps(model, loaded(found, found.statistics))
    state = anomalib_names(model)
    del state["model.mean_std.mean"]
    torch.save({"state_dict": OrderedDict(state)}, path)
    assert read_foreign(path).statistics is None, "half of them is none"


@pytest.mark.parametrize("names", ["reference", "anomalib"])
@pytest.mark.parametrize("pickled", [False, True])
def test_teachers(size, tmp_path, names, pickled):
    teacher = pdn(size, 384, padded=False)
    state = teacher.state_dict()
    if names == "anomalib":
        if pickled:
            pytest.skip("anomalib's teacher files are state dicts")
        renamed = {}
        for number, index in enumerate(INDICES[size], start=1):
            for kind in ("weight", "bias"):
                renamed[f"conv{number}.{kind}"] = state[f"{index}.{kind}"]
        state = renamed
    torch.save(teacher if pickled else state, tmp_path / "teacher.pth")
    found = read_foreign(tmp_path / "teacher.pth")
    assert found.size == size
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(found.weights[name], tensor)
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "teacher.safetensors")
    write_teacher(found, link)
    assert link.is_symlink()
    again = find_teacher(str(tmp_path / "teacher.safetensors"), size, 0)
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(again.weights[name], tensor, rtol=1e-3, atol=1e-6)
    with pytest.raises(TeacherError, match=f"--size {size}"):
        find_teacher(str(tmp_path / "teacher.safetensors"), "small" if size == "medium" else "medium", 0)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_file_runs(tmp_path):
    fuse = tmp_path / "exploded"
    torch.save({"state_dict": {}, "bomb": Bomb(fuse)}, tmp_path / "bomb.pth")
    with pytest.raises(ImportFailed):
        read_foreign(tmp_path / "bomb.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(fuse)))
    with pytest.raises(ImportFailed):
        read_foreign(tmp_path / "plain.pth")
    assert not fuse.exists()


def test_files_from_before_pytorch_1_6(tmp_path):
    teacher = pdn("small", 384, padded=False)
    torch.save(teacher.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_foreign(tmp_path / "old.pth").weights["8.bias"], teacher[8].bias)


def test_what_is_refused_is_named(tmp_path):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), tmp_path / "norm.pth")
    with pytest.raises(ImportFailed, match=r"norm\.pth: .*a layer that no teacher has .*BatchNorm2d"):
        read_foreign(tmp_path / "norm.pth")
    (tmp_path / "t.pth").write_bytes(b"not safetensors")
    with pytest.raises(TeacherError, match="inspectord import takes other formats over"):
        find_teacher(str(tmp_path / "t.pth"), "small", 0)


@pytest.mark.parametrize("padded", [False, True])
def test_padding_that_a_checkpoint_tells_of_is_asked_for(good_parts, tmp_path, padded):
    torch.manual_seed(5)
    model = EfficientAD("small", Geometry(256, 256)).eval()
    content = {"state_dict": anomalib_names(model), "hyper_parameters": {"padding": padded}}
    torch.save(content, tmp_path / "m.ckpt")
    options = TrainOptions(dataset=good_parts, out=tmp_path / "b", geometry=Geometry(256, 256, not padded))
    with pytest.raises(ImportFailed, match=f"{'add' if padded else 'leave out'} --padded"):
        import_model(read_foreign(tmp_path / "m.ckpt"), options)


def test_an_anomalib_model_of_another_size_is_refused(good_parts, tmp_path):
    torch.manual_seed(5)
    model = EfficientAD("small", Geometry(256, 256)).eval()
    torch.save({"state_dict": anomalib_names(model)}, tmp_path / "m.ckpt")
    options = TrainOptions(dataset=good_parts, out=tmp_path / "b", geometry=Geometry(128, 128))
    with pytest.raises(ImportFailed, match="another image size than 256x256"):
        import_model(read_foreign(tmp_path / "m.ckpt"), options)


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(ImportFailed, match="no such file"):
        read_foreign(tmp_path / "none.pth")
    for text in ("<!DOCTYPE html>\n<html>", "version https://git-lfs.github.com/spec/v1\n", "404"):
        (tmp_path / "page.pth").write_text(text)
        with pytest.raises(ImportFailed, match=r"page\.pth: text instead of weights.*it begins with '(<!|ver|404)"):
            read_foreign(tmp_path / "page.pth")
    whole = BytesIO()
    torch.save({"0.weight": torch.ones(3), "0.bias": torch.zeros(2)}, whole)
    blob = whole.getvalue()
    for content in (b"", b"\0garbage" * 100, b"PK\x03\x04", b"\x80\x02.", blob[: len(blob) // 2], blob[:-30]):
        (tmp_path / "garbage.pth").write_bytes(content)
        with pytest.raises(ImportFailed, match=r"garbage\.pth: not a readable"):
            read_foreign(tmp_path / "garbage.pth")
    for place in range(len(blob)):
        (tmp_path / "garbage.pth").write_bytes(blob[:place] + bytes([blob[place] ^ 0xFF]) + blob[place + 1 :])
        with contextlib.suppress(ImportFailed):  # a flipped bit may also hit what nobody reads
            read_state(tmp_path / "garbage.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ImportFailed, match=r"cut\.safetensors"):
        read_foreign(tmp_path / "cut.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ImportFailed, match="holds a list"):
        read_foreign(tmp_path / "list.pth")
    torch.save(pdn("small", 768, padded=False).state_dict(), tmp_path / "student.pth")
    with pytest.raises(ImportFailed, match=r"not a teacher of 384 channels.*8\.weight is \(768, "):
        read_foreign(tmp_path / "student.pth")
    torch.save(pdn("small", 384, padded=False).state_dict(), tmp_path / "teacher_final.pth")
    with pytest.raises(ImportFailed, match=r"student_final\.pth: no such file"):
        read_foreign(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TeacherError, match="not a teacher file of inspectord"):
        read_teacher(tmp_path / "other.safetensors")
    ours = load_file(SHIPPED / "procedural-small.safetensors")
    for facts in ('["name", "origin"]', '{"name": "mine"}'):
        save_file(ours, tmp_path / "t.safetensors", {"format": FORMAT, "size": "small", "facts": facts})
        with pytest.raises(TeacherError, match="its facts do not tell name and origin"):
            read_teacher(tmp_path / "t.safetensors")


def test_an_imported_model_is_calibrated_on_good_images_and_remembers_them(good_parts, tmp_path):
    torch.manual_seed(2)
    model = EfficientAD("small", Geometry(256, 256)).eval()
    for part in ("teacher", "student", "autoencoder"):
        torch.save(getattr(model, part), tmp_path / f"{part}_final.pth")
    options = TrainOptions(dataset=good_parts, out=tmp_path / "bundle", geometry=Geometry(), held_out_share=0.25)
    options = replace(options, preprocess=PreprocessSpec(256, 256))
    bundle = import_model(read_foreign(tmp_path), options)
    assert bundle.calibration["held_out_images"] == 3
    assert bundle.training["teacher_statistics"] == "from the good images"
    assert len(bundle.training["digests"]) == 12
    np.testing.assert_array_equal(bundle.model.weights["student.0.weight"], model.student[0].weight.detach())
    with pytest.raises(DatasetError, match="holds images of the data set"):
        import_model(read_foreign(tmp_path), replace(options, out=good_parts))
    broken = read_foreign(tmp_path)
    del broken.weights["student.8.bias"]
    with pytest.raises(ImportFailed, match=r"tensor student\.8\.bias is missing"):
        import_model(broken, options)
