"""A party dies: the others notice, nothing is lost, and the run ends as `engine.on_failure` says."""

import json

import pytest
from federated import killer, run_tiny, weights_of
from helpers import differences

from splitlearn.engines.processes import PartyLostError


def test_stop_says_who_when_and_how_to_go_on(configure, tmp_path):
    asked = ["num_alices=3", "engine=processes", *killer("alice1", 20, tmp_path)]
    with pytest.raises(PartyLostError, match=r"alice1 was lost at mini-batch \d+: its process ended .* ckpt="):
        run_tiny(configure, tmp_path / "run", *asked)
    assert "alice1 was lost" in json.loads((tmp_path / "run" / "results.json").read_text())["stopped"]
    whole = run_tiny(configure, tmp_path / "whole", "num_alices=3")
    resumed = run_tiny(configure, tmp_path / "resumed", *asked, f"ckpt={tmp_path}/run")
    assert resumed == whole
    assert differences(weights_of(tmp_path / "resumed", ["bob", "alice2"]), weights_of(tmp_path / "whole")) == []


@pytest.mark.parametrize("party", ["alice1", "bob"])
def test_wait_goes_on_as_if_nothing_had_happened(party, configure, tmp_path):
    asked = ["num_alices=3", "engine=processes", "engine.on_failure=wait", *killer(party, 25, tmp_path)]
    ours = run_tiny(configure, tmp_path / "run", *asked)
    assert (tmp_path / "killed").exists()
    assert ours == run_tiny(configure, tmp_path / "whole", "num_alices=3")
    assert differences(weights_of(tmp_path / "run", ["bob", "alice2"]), weights_of(tmp_path / "whole")) == []
