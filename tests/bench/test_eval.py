"""`bench.eval`: what is said of two rows' agreement."""

import math

from bench.eval import agreement


def test_agreement():
    theirs = {"choices": [[-1.0, -2.0], [-3.0, -3.0001]], "pages": [[-100.0]]}
    ours = {"choices": [[-1.0, -2.0], [-3.0002, -3.0001]], "pages": [[-101.0]]}
    assert agreement(theirs, theirs) == "largest difference 0.0e+00; the same choice on every question"
    assert agreement(ours, theirs) == "largest difference 1.0e-02; another choice on 1: choices 1 (1.0e-04)"


def test_what_is_no_number_agrees_with_nothing():
    """max(0.0, nan) is 0.0: a row of NaN said that it differed by nothing."""
    theirs = {"choices": [[-1.0, -2.0]]}
    for wrong in (math.nan, -math.inf):
        assert "no finite number" in agreement({"choices": [[-1.0, wrong]]}, theirs)
