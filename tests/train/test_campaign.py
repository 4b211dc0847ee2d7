"""A few of each kind of the campaign of faults; all of them: `python -m tests.campaign`."""

import pytest

from tests import campaign


@pytest.mark.slow
def test_runs_that_were_killed_damaged_or_had_a_failing_disk_come_to_the_same(tmp_path):
    done = campaign.run(tmp_path, kills=6, damages=6, errors=6, seed=1)
    assert sum(done.counts.values()) == 18
    assert done.bad == 0, done.counts


def test_a_result_that_is_wrong_in_silence_is_counted_as_bad():
    done = object.__new__(campaign.Campaign)
    done.counts = campaign.collections.Counter({("kills", "equal"): 3, ("kills", "wrong: other"): 2})
    assert done.bad == 2
