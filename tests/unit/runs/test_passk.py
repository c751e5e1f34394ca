"""avg@k and pass@k against a count of all subsets."""

from itertools import combinations

import pytest

from verl_aqn.errors import DataError
from verl_aqn.runs.stats.passk import avg_at_k, ks, mean_pass, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_answer(samples):
    for right in range(samples + 1):
        answers = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(combinations(answers, k))
            assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_one_is_the_average_and_many_samples_do_not_overflow():
    assert all(pass_at_k(right, 8, 1) == pytest.approx(avg_at_k(right, 8)) for right in range(9))
    assert 0.0 < pass_at_k(1, 4096, 2048) == pytest.approx(0.5)


def test_of_several_samples_the_powers_of_two_and_all_are_told():
    assert [ks(samples) for samples in (1, 2, 3, 6, 8)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_means_are_over_problems():
    assert mean_pass([0, 4, 1, 2], 4) == pytest.approx({1: 7 / 16, 2: (0 + 1 + 1 / 2 + 5 / 6) / 4, 4: 3 / 4})


@pytest.mark.parametrize(("right", "samples", "k"), [(-1, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5), (0, 0, 1)])
def test_counts_that_cannot_be_are_refused(right, samples, k):
    with pytest.raises(DataError):
        pass_at_k(right, samples, k)


def test_no_problem_has_no_mean():
    with pytest.raises(DataError, match="no problem"):
        mean_pass([], 4)
