"""Real disks, signals and damage; `python -m reliability.disasters` plays all scenes."""

import pytest
from reliability.disasters import SCENES, can_mount, play_apart

IN_CI = ["second_signal", "checkpoint_with_a_flipped_bit"]
ON_A_DISK = ["full_disk", "read_only_at_start"]


@pytest.mark.weekly
def test_every_disaster_ends_in_a_message_and_a_usable_checkpoint():
    assert set(IN_CI) <= {scene.__name__ for scene in SCENES}
    assert set(play_apart(IN_CI)) == set(IN_CI)


@pytest.mark.weekly
def test_a_disk_in_trouble_ends_in_a_message_and_a_usable_checkpoint():
    if not can_mount():
        pytest.skip("a small disk needs `unshare -rm`, which this user may not")
    assert set(ON_A_DISK) <= {scene.__name__ for scene in SCENES}
    assert set(play_apart(ON_A_DISK)) == set(ON_A_DISK)
