"""Real disks, signals and damage; `python -m reliability.disasters` plays all scenes."""

import pytest
from reliability.disasters import SCENES, can_mount, play_apart

IN_CI = ["second_signal", "checkpoint_with_a_flipped_bit"]
ON_A_DISK = ["full_disk", "read_only_at_start"]


@pytest.mark.weekly
def test_every_disaster_ends_in_a_message_and_a_usable_checkpoint():
    mounts = can_mount()
    names = IN_CI + (ON_A_DISK if mounts else [])
    assert set(names) <= {scene.__name__ for scene in SCENES}
    assert set(play_apart(names)) == set(names)
    if not mounts:
        pytest.skip("the scenes on a small disk need `unshare -rm`, which this user may not")
