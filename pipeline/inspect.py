"""From a frame to an inspection: the one place that decides OK, NG or INVALID."""

from __future__ import annotations

import math
from collections.abc import Callable
from traceback import TracebackException

import numpy as np

from drivers.frame import Frame, FrameStatus, Image, PixelFormat
from pipeline.bundle import Bundle
from pipeline.engine import Engine, Pending, RawMaps
from pipeline.inspection import Inspection, Outcome, Reason
from pipeline.plausible import PlausibilityCheck, PlausibleLimits
from pipeline.preprocess import FormatMismatch
from pipeline.scoring import FloatMap, Region, Scorer


class Inspector:
    """Judge frames in their order with one bundle on one engine. Used by a single thread."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        limits: PlausibleLimits | None = None,
        threshold: float | None = None,
    ) -> None:
        """Prepare.

        Args:
            bundle: model, quantiles, preprocessing.
            engine: made for this bundle; its precision chooses among the bundle's quantiles and thresholds.
            limits: what counts as a plausible image.
            threshold: instead of the bundle's own.
        """
        self.bundle = bundle = bundle.at(engine.precision)
        self.engine = engine
        self.threshold = bundle.threshold if threshold is None else threshold
        self._check = PlausibilityCheck(limits or PlausibleLimits())
        self._trained = frozenset(PixelFormat(name) for name in bundle.training.get("pixel_formats", ()))
        self._unfit = frozenset(fmt for fmt in PixelFormat if self._is_unfit(fmt))
        self._scorer = Scorer(bundle.model.geometry, bundle.model.preprocess.ignored_in_roi())

    def warm_up(self) -> None:
        """Do what is done once only, so that the first part is not the slowest.

        Preparing dark frame and flat field for a 5 MP camera takes as long as a deadline, and so does compiling a
        pixel format's kernel.
        """
        self.engine.warm_up()
        spec = self.bundle.model.preprocess
        given = next((array for array in (spec.dark, spec.flat, spec.ignore) if array is not None), None)
        if given is not None:
            rows, columns = given.shape[:2]
        elif spec.roi is not None:
            rows, columns = spec.roi.y + spec.roi.height, spec.roi.x + spec.roi.width
        else:
            rows, columns = spec.height, spec.width
        for name in self.bundle.training.get("pixel_formats", ()):
            fmt = PixelFormat(name)
            shape = (rows, columns, 3) if fmt.channels == 3 else (rows, columns)
            blank: Image = np.zeros(shape, np.uint8) if fmt.bits == 8 else np.zeros(shape, np.uint16)
            self.engine.begin(blank, fmt)()

    def inspect(self, frame: Frame) -> Inspection:
        """Judge one frame; every failure becomes INVALID with its reason, nothing is raised."""
        return self.begin(frame)()

    def begin(self, frame: Frame) -> Callable[[], Inspection]:
        """Begin with a frame, also before those on their way are finished, where the engine takes more at once.

        Returns what waits for the engine and judges; to be called in the order of frames. Every failure becomes
        INVALID with its reason, nothing is raised here or there. The frame's image must stay valid until it is
        finished and the next one was begun, which is compared with it.
        """
        if frame.status is not FrameStatus.COMPLETE:
            reason = Reason.TIMEOUT if frame.status is FrameStatus.PENDING else Reason(frame.status.value)
            missing = Inspection(Outcome.INVALID, reason, frame.detail)
            return lambda: missing
        try:
            on_its_way = self._to_engine(frame)
        except Exception as error:  # noqa: BLE001 - whatever the engine throws, this part gets its verdict
            self._check.forget()
            failed = _failed(error)
            return lambda: failed
        # Beside the networks, and once the image was read: looking for samples in what no cache holds takes longer.
        implausible = self._implausible(frame)

        def finish() -> Inspection:
            try:
                raw = on_its_way()  # what was begun is waited for in any case, and may fail
                return implausible or self._judge(frame, raw)
            except Exception as error:  # noqa: BLE001 - the same
                return _failed(error)

        return finish

    def _to_engine(self, frame: Frame) -> Pending:
        image, fmt = frame.image, frame.pixel_format
        if image is None or fmt is None:
            raise ValueError("a complete frame without an image")
        self._check_format(fmt)
        return self.engine.begin(image, fmt)

    def _implausible(self, frame: Frame) -> Inspection | None:
        assert frame.image is not None
        assert frame.pixel_format is not None
        try:
            problem = self._check.problem(frame.image, frame.pixel_format)
        except Exception as error:  # noqa: BLE001 - the same
            self._check.forget()
            return _failed(error)
        return None if problem is None else Inspection(Outcome.INVALID, Reason.IMAGE, problem)

    def _judge(self, frame: Frame, raw: RawMaps) -> Inspection:
        if not (np.isfinite(raw.student_teacher).all() and np.isfinite(raw.autoencoder).all()):
            return Inspection(Outcome.INVALID, Reason.ENGINE, "the anomaly map holds values that are not finite")
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow shows in the score, below
            combined = self._scorer.combine(raw.student_teacher, raw.autoencoder, self.bundle.quantiles)
        anomaly_map = self._scorer.blank(combined)
        stretched = self._scorer.stretch(anomaly_map)
        score = float(stretched.max())
        outcome = judge(score, self.threshold)
        if outcome is Outcome.INVALID:
            return Inspection(outcome, Reason.ENGINE, f"the score is {score}, the threshold {self.threshold}")
        regions = [] if outcome is Outcome.OK else self._regions(stretched, frame)
        return Inspection(
            outcome,
            score=score,
            anomaly_map=anomaly_map,
            regions=regions,
            preprocess_ns=raw.preprocess_ns,
            infer_ns=raw.infer_ns,
        )

    def _regions(self, stretched: FloatMap, frame: Frame) -> list[Region]:
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        return self._scorer.regions(stretched, self.threshold, self.bundle.model.preprocess.area(width, height))

    def _check_format(self, fmt: PixelFormat) -> None:
        if fmt in self._unfit:
            names = ", ".join(sorted(trained.value for trained in self._trained))
            raise FormatMismatch(f"the bundle was trained on {names}, this is {fmt.value}; set pixel_format")

    def _is_unfit(self, fmt: PixelFormat) -> bool:
        """Find plausible nonsense: 12 bits called 16, four bits too dark, and Bayer patterns called grey.

        Colours that were taken out of a Bayer pattern before training are no such thing.
        """
        if not self._trained:
            return False
        longer = {trained.bits for trained in self._trained if trained.bits > 8}
        wrong_bits = fmt.bits > 8 and bool(longer) and fmt.bits not in longer
        if fmt.bayer:
            wrong_pattern = all(not trained.bayer and trained.channels == 1 for trained in self._trained)
        else:
            wrong_pattern = fmt.channels == 1 and all(trained.bayer for trained in self._trained)
        return wrong_bits or wrong_pattern


def _failed(error: Exception) -> Inspection:
    if isinstance(error, FormatMismatch):
        return Inspection(Outcome.INVALID, Reason.FORMAT, str(error))
    # Lines of code are read for the log only, after the verdict.
    told = TracebackException.from_exception(error, lookup_lines=False)
    return Inspection(Outcome.INVALID, Reason.ENGINE, f"{type(error).__name__}: {error}", error=told)


def judge(score: float, threshold: float) -> Outcome:
    """OK must be proven: a finite score at or below a finite threshold. NaN is never OK and never NG."""
    if not (math.isfinite(score) and math.isfinite(threshold)):
        return Outcome.INVALID
    return Outcome.OK if score <= threshold else Outcome.NG
