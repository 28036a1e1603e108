"""Error budgets and poisoned memory."""

import math

import pytest
import torch

from course_lib.runtime.numerics import (
    assert_within_budget,
    budget,
    max_error,
    poisoned_copy,
    poisoned_view,
    rms_error,
)


def t(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def test_max_error():
    assert max_error(t(1.0, 2.5), t(1.0, 2.0)) == 0.5
    assert max_error(t(), t()) == 0.0
    assert max_error(t(1.5, dtype=torch.float16), t(1.0)) == 0.5


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_must_be_at_the_same_places(value):
    assert max_error(t(value, 1.0), t(value, 1.0)) == 0.0
    assert max_error(t(value, 1.0), t(0.0, 1.0)) == math.inf
    assert max_error(t(0.0, 1.0), t(value, 1.0)) == math.inf
    assert max_error(t(math.inf), t(-math.inf)) == math.inf


def test_rms_error():
    assert rms_error(t(3.0, 5.0), t(3.0, 4.0)) == pytest.approx(0.2)
    assert rms_error(t(0.0), t(0.0)) == 0.0
    assert rms_error(t(1.0), t(0.0)) == math.inf
    assert rms_error(t(math.nan), t(1.0)) == math.inf


def test_shapes_must_agree():
    for error in (max_error, rms_error):
        with pytest.raises(ValueError, match=r"shapes differ: \(2,\) and \(1,\)"):
            error(t(1.0, 2.0), t(1.0))


def test_budget_is_twice_the_reference_and_one_rounding():
    oracle = t(4.0, -1.0, -math.inf)
    reference = t(4.25, -1.0, -math.inf, dtype=torch.float16)
    eps = torch.finfo(torch.float16).eps
    assert budget(reference, oracle, torch.float16) == 2 * 0.25 + eps / 2 * 4.0
    assert budget(oracle, oracle, torch.float64) == torch.finfo(torch.float64).eps / 2 * 4.0
    assert budget(t(), t(), torch.float32) == 0.0


def test_assert_within_budget_says_where_and_how_far():
    oracle = t(1.0, 2.0, 3.0).reshape(1, 3)
    assert_within_budget(oracle + 0.1, oracle, 0.11, name="dq")
    wrong = oracle.clone()
    wrong[0, 1] = 2.5
    with pytest.raises(
        AssertionError, match=r"dq\[0, 1\] is 2.5, expected 2: off by 0.5, allowed "
    ):
        assert_within_budget(wrong, oracle, 0.1, name="dq")
    with pytest.raises(AssertionError, match=r"1 of 3 elements"):
        assert_within_budget(wrong, oracle, 0.1, name="dq")
    wrong[0, 1] = math.nan
    with pytest.raises(AssertionError, match=r"dq\[0, 1\] is nan"):
        assert_within_budget(wrong, oracle, 1e9, name="dq")
    with pytest.raises(AssertionError, match="off by"):
        assert_within_budget(oracle + 1, oracle, math.nan, name="dq")
    with pytest.raises(AssertionError, match=r"dq has shape \(3,\), expected \(1, 3\)"):
        assert_within_budget(oracle[0], oracle, 1.0, name="dq")


def test_poisoned_view():
    poisoned = poisoned_view((3, 5), torch.float16, border=2)
    assert poisoned.view.shape == (3, 5)
    assert not poisoned.view.is_contiguous()
    assert poisoned.parent.isnan().all()
    poisoned.view.zero_()
    poisoned.assert_border_untouched(name="out")
    assert int(poisoned.parent.isnan().sum()) == 7 * 9 - 15
    poisoned.parent[2, 7] = 1.0
    with pytest.raises(AssertionError, match=r"1 elements outside out were written.* \[2, 7\]"):
        poisoned.assert_border_untouched(name="out")


def test_poisoned_copy_keeps_values_and_shows_a_read_outside():
    x = torch.arange(6.0).reshape(2, 3)
    poisoned = poisoned_copy(x, border=1)
    assert torch.equal(poisoned.view, x)
    one_too_wide = poisoned.view.as_strided((2, 4), poisoned.view.stride())
    assert one_too_wide.sum().isnan()
