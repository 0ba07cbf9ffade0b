"""The report of an evaluation or a training: one HTML file that stands alone, and its pictures as PNGs."""

from __future__ import annotations

import base64
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from calibrate.evaluate import NOT_SHOWN, Evaluation, ScoredImage, declared_format, read_pixels
from calibrate.layouts import GOOD, REPORT_PAGE, read_defects
from calibrate.metrics import PRO_LIMIT, Rate
from calibrate.normalize import promised_false_reject_rate
from drivers.frame import Image, PixelFormat
from drivers.replay import read_image
from pipeline.bundle import Bundle, write_atomically
from pipeline.overlay import lay_over, to_bgr
from pipeline.scoring import FloatMap, Scorer

_SHOWN_OF_A_KIND = 3
_THUMBNAIL_PX = 320
_DOTS_PER_INCH = 110
_GREEN, _RED, _BLUE, _GREY = "#2a7f3f", "#c0392b", "#1f5fa8", "#777777"


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure or photograph of the report."""

    name: str
    """File name without suffix."""
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture inside the HTML file itself."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Example:
    """An image with its map and mask side by side."""

    title: str
    verdict: str
    picture: Picture


@dataclass(frozen=True, slots=True)
class Gallery:
    """Examples of one kind."""

    kind: str
    groups: list[tuple[str, list[Example]]]
    """What they are examples of, and they."""


def write_evaluation_report(evaluation: Evaluation, bundle: Bundle, folder: Path) -> Path:
    """Write the report of an evaluation into a folder; returns the HTML file. Raises OSError."""
    figures = [_score_histogram(evaluation), _roc_figure(evaluation)]
    if evaluation.pixel is not None:
        figures.append(_pro_figure(evaluation))
    kinds = [GOOD, *evaluation.kinds]
    facts = evaluation.to_json()
    return _write(
        folder,
        title="Evaluation of an inspection model",
        subtitle=f"{evaluation.run['dataset']} · {evaluation.test_set.layout}",
        metrics=_metric_rows(facts),
        confusion=_confusion(evaluation),
        figures=figures,
        galleries=[_gallery(kind, evaluation, bundle) for kind in kinds],
        facts=_flat(facts["run"]),
    )


@dataclass(frozen=True)
class TrainingRecord:
    """What a training leaves for its report."""

    losses: NDArray[np.float64]
    """(points, 1 + terms): step and the losses there."""
    loss_names: Sequence[str]
    held_out_names: list[str]
    held_out_paths: list[Path]
    held_out_scores: NDArray[np.float64]
    held_out_maps: list[FloatMap]
    """Normalised."""


def write_training_report(record: TrainingRecord, bundle: Bundle, folder: Path) -> Path:
    """Write what training knows of its own outcome: losses, held-out scores, the most unusual good parts."""
    rows = [
        ("Held-out good images", str(len(record.held_out_scores)), ""),
        ("Threshold", f"{bundle.threshold:.4f}", "parts above it are NG"),
        ("Expected false-reject rate", promised_false_reject_rate(bundle), "for parts like the held-out ones"),
        ("Defects", "not measured", "training sees good parts only: run inspectord evaluate"),
    ]
    scorer = Scorer(bundle.model.geometry, bundle.model.preprocess.ignored_in_roi())
    order = np.argsort(-record.held_out_scores, kind="stable")[: 2 * _SHOWN_OF_A_KIND]
    examples = []
    for place, index in enumerate(order.tolist()):
        image, fmt = read_image(record.held_out_paths[index], declared_format(bundle))
        area = bundle.model.preprocess.area(image.shape[1], image.shape[0])
        stretched = scorer.stretch(record.held_out_maps[index])
        pixels = np.asarray(cv2.resize(stretched, (area.width, area.height)), np.float32)
        window = (slice(area.y, area.y + area.height), slice(area.x, area.x + area.width))
        found = _example(
            f"good-{place}",
            record.held_out_names[index],
            float(record.held_out_scores[index]),
            image,
            pixels,
            window,
            None,
            bundle.threshold,
            fmt,
        )
        examples.append(found)
    return _write(
        folder,
        title="Training of an inspection model",
        subtitle=str(bundle.training.get("dataset", "")),
        metrics=rows,
        confusion=None,
        figures=[_held_out_histogram(record, bundle.threshold), _loss_figure(record)],
        galleries=[Gallery(GOOD, [("held-out parts with the highest scores", examples)])],
        facts=_flat(
            {"model": bundle.model_id, "calibration": bundle.calibration_id, "teacher": dict(bundle.teacher)}
            | {k: v for k, v in bundle.training.items() if k not in NOT_SHOWN}
            | {"versions": dict(bundle.versions)}
        ),
    )


def _write(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    html = environment.get_template("report.html.j2").render(written=written, **content)
    pictures = list(content["figures"])
    for gallery in content["galleries"]:
        pictures += [example.picture for _, examples in gallery.groups for example in examples]
    path = folder / REPORT_PAGE
    # First: beside it, pictures are never taken for photographs of parts.
    write_atomically(path, html.encode(errors="replace"))
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", picture.png)
    return path


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _metric_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    image, pixel = facts["image"], facts["pixel"]
    rows = [
        ("Image AU-ROC", f"{_percent(image['auroc'])}%", "100% ranks every defective part above every good one"),
        ("Image AP", f"{_percent(image['ap'])}%", "area under precision against recall"),
        ("Image F1-max", f"{_percent(image['f1_max'])}%", "best balance of precision and recall at any threshold"),
    ]
    if pixel is not None:
        rows += [
            ("Pixel AU-ROC", f"{_percent(pixel['auroc'])}%", ""),
            ("Pixel AP", f"{_percent(pixel['ap'])}%", ""),
            (
                "AU-PRO",
                f"{_percent(pixel['aupro'])}%",
                "every defect counts the same, up to 30% false-positive pixels",
            ),
        ]
        if "auspro" in pixel:
            rows.append(
                ("AU-sPRO", f"{_percent(pixel['auspro'])}%", "with saturation, up to 5% false-positive pixels")
            )
    return rows


def _rate_text(rate: Rate) -> str:
    if rate.interval is None:
        return "–"
    low, high = rate.interval
    return f"{_percent(rate.rate)}% ({_percent(low)}–{_percent(high)}%)"


def _confusion(evaluation: Evaluation) -> list[dict[str, str]]:
    good = evaluation.false_rejects
    theirs = "; the threshold was made for these very images" if evaluation.stand_ins else ""
    rows = [
        {
            "kind": GOOD,
            "images": str(good.of),
            "ok": str(good.of - good.count),
            "ng": str(good.count),
            "wrong": f"false rejects {_rate_text(good)}{theirs}",
            "auroc": "",
            "aupro": "",
        }
    ]
    for name, kind in evaluation.kinds.items():
        rows.append(
            {
                "kind": name,
                "images": str(kind.escapes.of),
                "ok": str(kind.escapes.count),
                "ng": str(kind.escapes.of - kind.escapes.count),
                "wrong": f"escapes {_rate_text(kind.escapes)}",
                "auroc": _percent(kind.image.auroc),
                "aupro": "–" if kind.pixel is None else _percent(kind.pixel.aupro),
            }
        )
    return rows


def _figure(width: float = 5.6) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def _bins(scores: NDArray[np.float64], threshold: float) -> NDArray[np.float64]:
    top = max(float(np.quantile(scores, 0.98)), 1.5 * threshold)
    return np.linspace(min(float(scores.min()), 0.0), top, 45)


def _score_histogram(evaluation: Evaluation) -> Picture:
    scores = np.array([s.score for s in evaluation.scored])
    kinds = np.array([s.image.kind for s in evaluation.scored])
    bins = _bins(scores, evaluation.threshold)
    shown = np.minimum(scores, bins[-1])
    figure, axis = _figure(11.4)
    names = list(evaluation.kinds)
    axis.hist([shown[kinds == name] for name in names], bins=bins, stacked=True, label=names, alpha=0.85)
    axis.hist(shown[kinds == GOOD], bins=bins, label=GOOD, histtype="step", color=_GREEN, linewidth=2)
    axis.axvline(evaluation.threshold, color="black", linestyle="--", label=f"threshold {evaluation.threshold:.3f}")
    axis.set_xlabel("image score (the last bar holds all above)")
    axis.set_ylabel("images")
    axis.legend(frameon=False, fontsize=8)
    return Picture("scores", "Scores of good and defective parts", _png(figure))


def _roc_figure(evaluation: Evaluation) -> Picture:
    from sklearn.metrics import roc_curve

    scores = np.array([s.score for s in evaluation.scored])
    kinds = np.array([s.image.kind for s in evaluation.scored])
    figure, axis = _figure()
    for name in evaluation.kinds:
        both = (kinds == GOOD) | (kinds == name)
        fpr, tpr, _ = roc_curve(kinds[both] != GOOD, scores[both])
        axis.plot(fpr, tpr, linewidth=1, label=f"{name} {_percent(evaluation.kinds[name].image.auroc)}%")
    fpr, tpr, _ = roc_curve(kinds != GOOD, scores)
    axis.plot(fpr, tpr, color="black", linewidth=2, label=f"all {_percent(evaluation.image.auroc)}%")
    axis.set_xlabel("good parts rejected")
    axis.set_ylabel("defective parts found")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return Picture("roc", "ROC of whole images", _png(figure))


def _pro_figure(evaluation: Evaluation) -> Picture:
    assert evaluation.pixel is not None
    figure, axis = _figure()
    for name, kind in evaluation.kinds.items():
        if kind.pixel is not None:
            label = f"{name} {_percent(kind.pixel.aupro)}%"
            axis.plot(kind.pixel.pro.fpr, kind.pixel.pro.overlap, linewidth=1, label=label)
    pro = evaluation.pixel.pro
    axis.plot(pro.fpr, pro.overlap, color="black", linewidth=2, label=f"all {_percent(evaluation.pixel.aupro)}%")
    axis.set_xlim(0, PRO_LIMIT)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("good pixels marked")
    axis.set_ylabel("mean share of each defect marked (PRO)")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return Picture("pro", "Per-region overlap up to 30% false-positive pixels", _png(figure))


def _held_out_histogram(record: TrainingRecord, threshold: float) -> Picture:
    figure, axis = _figure()
    scores = record.held_out_scores
    axis.hist(np.minimum(scores, _bins(scores, threshold)[-1]), bins=_bins(scores, threshold), color=_GREEN)
    axis.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axis.set_xlabel("image score")
    axis.set_ylabel("held-out good images")
    axis.legend(frameon=False, fontsize=8)
    return Picture("held-out", "Scores of good parts that training never saw", _png(figure))


def _loss_figure(record: TrainingRecord) -> Picture:
    figure, axis = _figure()
    for column, name in enumerate(record.loss_names, start=1):
        values = record.losses[:, column]
        if np.any(values > 0):
            axis.plot(record.losses[:, 0], values, linewidth=1, label=name.replace("_", "-"))
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=8)
    return Picture("losses", "Losses, averaged over neighbouring steps", _png(figure))


def _gallery(kind: str, evaluation: Evaluation, bundle: Bundle) -> Gallery:
    ranked = sorted((s for s in evaluation.scored if s.image.kind == kind), key=lambda s: s.score)
    if kind != GOOD:
        ranked.reverse()
    best, others = ranked[:_SHOWN_OF_A_KIND], ranked[_SHOWN_OF_A_KIND:]
    worst = others[::-1][:_SHOWN_OF_A_KIND]
    words = ("lowest scores", "highest scores") if kind == GOOD else ("found most clearly", "found least clearly")

    def examples(group: list[ScoredImage], which: str) -> list[Example]:
        return [_scored_example(f"{kind}-{which}-{i}", one, evaluation, bundle) for i, one in enumerate(group)]

    groups = [(words[0], examples(best, "best"))]
    if worst:
        groups.append((words[1], examples(worst, "worst")))
    return Gallery(kind, groups)


def _scored_example(name: str, scored: ScoredImage, evaluation: Evaluation, bundle: Bundle) -> Example:
    scorer = Scorer(bundle.model.geometry, bundle.model.preprocess.ignored_in_roi())
    pixels, window = read_pixels(scored, bundle, scorer)
    truth = None
    if scored.masked:
        truth = np.zeros(scored.shape, np.bool_)
        for region in read_defects(evaluation.test_set, scored.image, scored.shape)[0]:
            truth |= region.mask
    image, fmt = read_image(scored.image.file.path, declared_format(bundle))
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    return _example(
        safe,
        scored.image.file.name,
        scored.score,
        image,
        pixels,
        window,
        truth,
        evaluation.threshold,
        fmt,
    )


def _example(
    name: str,
    title: str,
    score: float,
    image: Image,
    pixels: FloatMap,
    window: tuple[slice, slice],
    truth: NDArray[np.bool_] | None,
    threshold: float,
    fmt: PixelFormat,
) -> Example:
    bgr = to_bgr(image, fmt)
    scale = min(1.0, _THUMBNAIL_PX / max(bgr.shape[:2]))
    size = (max(1, round(bgr.shape[1] * scale)), max(1, round(bgr.shape[0] * scale)))
    photograph = np.asarray(cv2.resize(bgr, size, interpolation=cv2.INTER_AREA), np.uint8)
    whole = np.zeros(bgr.shape[:2], np.float32)
    whole[window] = np.where(np.isfinite(pixels), pixels, 0)
    panels = [photograph, lay_over(photograph, np.asarray(cv2.resize(whole, size), np.float32), threshold)]
    if truth is not None:
        mask = cv2.resize(truth.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA)
        panels.append(np.asarray(cv2.cvtColor(mask, cv2.COLOR_GRAY2BGR), np.uint8))
    gap = np.full((size[1], 6, 3), 255, np.uint8)
    strip = np.concatenate([piece for panel in panels for piece in (panel, gap)][:-1], axis=1)
    verdict = "OK" if score <= threshold else "NG"
    caption = f"{title}: {verdict}, score {score:.3f}"
    return Example(title, verdict, Picture(f"example-{name}", caption, cv2.imencode(".png", strip)[1].tobytes()))


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in facts.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flat(value, f"{label}: ")
        elif isinstance(value, list) and len(value) > 12:
            rows.append((label, f"{len(value)} entries"))
        else:
            rows.append((label, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
