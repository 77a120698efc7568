"""Runs give the losses that they gave before, up to what another CPU rounds otherwise. See tests/goldens.py."""

import json

import pytest

from tests import goldens

EXPECTED = json.loads(goldens.PATH.read_text())
QUICK = [case for case in goldens.CASES if case.endswith("relu2 float32")]
ALL = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in goldens.CASES]


@pytest.mark.parametrize("case", ALL)
def test_losses_are_those_of_before(case, tiny_track, tmp_path):
    found = goldens.train(case, tiny_track, tmp_path)
    # On another instruction set they differ by up to 3e-7, in bfloat16 by 6e-5.
    relative = 1e-3 if case.endswith("bfloat16") else 2e-5
    for kind in ("val", "train"):
        assert found[kind] == pytest.approx(EXPECTED[case][kind], rel=relative), "python -m tests.goldens renews them"
