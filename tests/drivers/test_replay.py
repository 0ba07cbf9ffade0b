from __future__ import annotations

import errno
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from daemon.images import Picture, write_picture
from drivers.camera import CameraError, EndOfStream
from drivers.frame import FrameStatus, PixelFormat
from drivers.replay import ReplayCamera, ReplayOptions, list_images


def play(path, **options):
    camera = ReplayCamera(ReplayOptions(driver="replay", path=str(path), **options))
    camera.open()
    frames = []
    while True:
        try:
            frames += camera.grab(0.01)
        except EndOfStream:
            return frames


def picture(value=100, shape=(20, 30), dtype=np.uint8):
    return np.full(shape, value, dtype)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("img10.png", "img2.png", "sub/img1.png", "img1.jpg"):
        cv2.imwrite(str(tmp_path / name), picture())
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folders_are_played_recursively_in_natural_order(folder):
    assert [f.source for f in play(folder)] == ["img1.jpg", "img2.png", "img10.png", "sub/img1.png"]


def test_a_folder_that_the_disk_does_not_give_is_an_error_and_not_left_out(folder, monkeypatch):
    (folder / "below").mkdir()
    scan, number, all_images = os.scandir, errno.ESTALE, list_images(folder)

    def ill(path):
        if Path(path).name == "below":
            raise OSError(number, os.strerror(number), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", ill)
    with pytest.raises(OSError, match="Stale file handle"):
        list_images(folder)
    number = errno.EACCES
    assert list_images(folder) == all_images, "what may not be read is nobody's image"


def test_globs_and_single_files(folder):
    assert [f.source.rsplit("/", 1)[-1] for f in play(folder / "*.png")] == ["img2.png", "img10.png"]
    assert [f.source for f in play(folder / "img2.png")] == ["img2.png"]


def test_loop_and_limit(folder):
    frames = play(folder, loop=True, frames=10)
    assert len(frames) == 10
    assert frames[4].source == frames[0].source


def test_formats_come_from_the_files_or_from_the_options(tmp_path):
    cv2.imwrite(str(tmp_path / "a_grey.png"), picture())
    cv2.imwrite(str(tmp_path / "b_colour.png"), picture(shape=(20, 30, 3)))
    cv2.imwrite(str(tmp_path / "c_16bit.png"), picture(3000, dtype=np.uint16))
    assert [f.pixel_format for f in play(tmp_path)] == ["Mono8", "BGR8", "Mono16"]
    declared = play(tmp_path, pixel_format=PixelFormat.MONO12)
    assert [f.status for f in declared] == ["unreadable", "unreadable", "complete"]
    assert declared[2].image.max() == 3000
    assert "which is not Mono12" in declared[0].detail


def test_formats_of_kept_images_come_from_their_descriptions(tmp_path):
    def keep(name, fmt, image):
        write_picture(tmp_path / name, Picture(image, PixelFormat(fmt), None, None), "png")

    colours = np.dstack([picture(10), picture(20), picture(30)])
    keep("a", "BayerRG8", picture())
    keep("b", "Mono12", picture(3000, dtype=np.uint16))
    keep("c", "RGB8", colours)
    cv2.imwrite(str(tmp_path / "d.png"), picture())
    (tmp_path / "d.json").write_text('{"shapes": []}\n{"more": "lines"}')  # another program's
    cv2.imwrite(str(tmp_path / "e.png"), picture())
    (tmp_path / "e.json").write_text('{"schema": "inspectord.image/1", "file": "e.png", "pixel_format": "Mono9"}')
    *whole, damaged = play(tmp_path)
    assert [f.pixel_format for f in whole] == ["BayerRG8", "Mono12", "BGR8", "Mono8"]
    assert (whole[2].image[..., ::-1] == colours).all()
    assert damaged.status == "unreadable"
    assert "e.json beside it is damaged: 'Mono9'" in damaged.detail
    assert [f.pixel_format for f in play(tmp_path / "a.png", pixel_format=PixelFormat.MONO8)] == ["Mono8"]
    (declared,) = play(tmp_path / "c.png", pixel_format=PixelFormat.RGB8)
    assert declared.pixel_format == "BGR8", "of the camera; a file is decoded to B, G, R"
    assert (declared.image[..., ::-1] == colours).all()


def test_what_a_folder_does_not_show_is_not_played(folder):
    before = len(play(folder))
    for hidden in (".Trash-1000/files/1.png", "sub/.thumbs/1.png", ".1.png"):
        (folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / hidden), picture())
    assert len(play(folder)) == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".bmp"])
def test_truncated_files_become_unreadable_frames(tmp_path, suffix, rng):
    image = rng.integers(0, 255, (64, 64)).astype(np.uint8)
    whole = cv2.imencode(suffix, image)[1].tobytes()
    (tmp_path / f"a{suffix}").write_bytes(whole)
    (tmp_path / f"b{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"c{suffix}").write_bytes(b"")
    (tmp_path / f"d{suffix}").write_bytes(b"this is not an image")
    frames = play(tmp_path)
    assert [f.status for f in frames] == ["complete", "unreadable", "unreadable", "unreadable"]
    assert all(f.detail and f.image is None for f in frames[1:])


def test_a_file_that_vanishes_while_playing_is_unreadable(folder):
    camera = ReplayCamera(ReplayOptions(driver="replay", path=str(folder)))
    camera.open()
    (folder / "img1.jpg").unlink()
    assert camera.grab(0.01)[0].status is FrameStatus.UNREADABLE
    assert camera.grab(0.01)[0].status is FrameStatus.COMPLETE


def test_video_files(tmp_path):
    path = tmp_path / "line.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for value in (40, 120, 200):
        video.write(np.full((48, 64, 3), value, np.uint8))
    video.release()
    frames = play(path)
    assert [round(float(f.image.mean()), -1) for f in frames] == [40, 120, 200]
    assert [f.source for f in frames] == ["line.avi#0", "line.avi#1", "line.avi#2"]


def test_a_truncated_video_ends_with_an_unreadable_frame(tmp_path):
    path = tmp_path / "line.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for value in range(40):
        video.write(np.full((48, 64, 3), value * 5, np.uint8))
    video.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames = play(path)
    assert 5 < len(frames) < 40
    assert {f.status for f in frames[:-1]} == {"complete"}
    assert frames[-1].status is FrameStatus.UNREADABLE
    assert "of 40: truncated" in frames[-1].detail
    with pytest.raises(CameraError, match="decoded as BGR8, not Mono8"):
        play(path, pixel_format=PixelFormat.MONO8)


def test_names_that_are_not_utf_8_can_still_be_published(tmp_path):
    name = b"teil_\xe4.png"
    (tmp_path / os.fsdecode(name)).write_bytes(cv2.imencode(".png", picture())[1].tobytes())
    (frame,) = play(tmp_path)
    assert frame.source == "teil_\ufffd.png"
    assert frame.status is FrameStatus.COMPLETE


def test_nothing_to_play(tmp_path):
    with pytest.raises(ValidationError, match="nothing there"):
        ReplayOptions(driver="replay", path=str(tmp_path / "missing"))
    camera = ReplayCamera(ReplayOptions(driver="replay", path=str(tmp_path)))
    with pytest.raises(CameraError, match="no images there"):
        camera.open()


def test_reopening_goes_on_where_it_stopped(folder):
    camera = ReplayCamera(ReplayOptions(driver="replay", path=str(folder)))
    camera.open()
    first = camera.grab(0.01)[0].source
    camera.close()
    camera.open()
    assert camera.grab(0.01)[0].source != first
