from __future__ import annotations

import pytest

from drivers.counter import INVALID_ID, BlockIdCounter


def missing(counter, ids):
    return [counter.missing_before(i) for i in ids]


def test_gige_ids_start_at_1_and_wrap_from_65535_to_1():
    assert missing(BlockIdCounter.gige(), [1, 2, 5]) == [0, 0, 2]
    counter = BlockIdCounter.gige()
    counter.missing_before(1)
    assert missing(counter, [30000, 60000, 65534, 65535, 1, 2]) == [29998, 29999, 5533, 0, 0, 0]


def test_gap_across_the_wrap_counts_no_zero():
    counter = BlockIdCounter.gige()
    missing(counter, [1, 20000, 40000, 60000, 65533])
    assert counter.missing_before(2) == 3  # 65534, 65535 and 1


def test_usb_ids_start_at_0_and_do_not_wrap_at_16_bits():
    assert missing(BlockIdCounter.usb(), [0, 1, 4, 30000, 60000, 65535, 65536]) == [0, 0, 2, 29995, 29999, 5534, 0]


def test_the_first_frames_of_an_acquisition_can_be_lost_too():
    assert BlockIdCounter.usb().missing_before(3) == 3
    assert BlockIdCounter.gige().missing_before(3) == 2


@pytest.mark.parametrize("counter", [BlockIdCounter.gige(), BlockIdCounter.usb()])
def test_a_counter_that_stands_still_or_goes_back_is_a_reset_not_a_gap(counter):
    assert missing(counter, [1, 2, 2, 1]) == ([0, 0, 0, 0] if counter.wraps_after else [1, 0, 0, 0])


def test_an_impossible_jump_is_a_reset_not_a_trillion_lost_frames():
    counter = BlockIdCounter.usb()
    assert missing(counter, [0, 5, 2**40, 2**40 + 2]) == [0, 4, 0, 1]
    assert BlockIdCounter.usb().missing_before(2**50) == 0


def test_ids_that_mean_nothing_are_skipped():
    counter = BlockIdCounter.gige()
    assert missing(counter, [1, INVALID_ID, 0, 2]) == [0, 0, 0, 0]
    assert BlockIdCounter.usb().missing_before(INVALID_ID) == 0
