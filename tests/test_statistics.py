"""Statistics against scipy, brute force and simulation."""

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from aurora.trainer.record import seed_gaps
from scripts.analysis import statistics as ours

A = [3.2781, 3.2795, 3.2779, 3.2786, 3.2790]
B = [3.2801, 3.2812, 3.2796, 3.2821]


def test_gate_is_the_public_rule():
    assert ours.gate(A, 3.28).margin == pytest.approx((3.28 - sum(A) / 5) * 5**0.5, abs=1e-15)
    assert not ours.gate(A, 3.28).passes
    assert ours.gate([3.2776, 3.2775, 3.2777], 3.28).passes
    assert not ours.gate([3.0, 3.0], 3.28).passes, "two runs are no evidence"
    assert not ours.gate([3.0, math.nan, 3.0, 3.0], 3.28).passes
    assert not ours.gate([], 3.28).passes


def test_t_tests_agree_with_their_formulas():
    n, mean, sd = len(A), np.mean(A), np.std(A, ddof=1)
    assert ours.t_below(A, 3.28) == pytest.approx(stats.t.cdf((mean - 3.28) / (sd / n**0.5), n - 1), abs=1e-12)
    va, vb = np.var(A, ddof=1) / len(A), np.var(B, ddof=1) / len(B)
    freedom = (va + vb) ** 2 / (va**2 / (len(A) - 1) + vb**2 / (len(B) - 1))
    t = (np.mean(A) - np.mean(B)) / (va + vb) ** 0.5
    found = ours.welch(A, B)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), freedom), abs=1e-12)
    half = stats.t.ppf(0.975, freedom) * (va + vb) ** 0.5
    assert found[:3] == pytest.approx((np.mean(A) - np.mean(B),) + (np.mean(A) - np.mean(B) - half,
                                      np.mean(A) - np.mean(B) + half), abs=1e-12)  # fmt: skip
    squares = sum((a - mean) ** 2 for a in A) / 0.0013**2
    assert ours.sd_test(A) == pytest.approx(1 - stats.chi2.cdf(squares, n - 1), abs=1e-12)


@pytest.mark.parametrize("values", [[], [3.2], [3.2, 3.1], [3.2, 3.2, 3.2]])
def test_too_few_or_equal_losses_give_no_p(values):
    assert math.isnan(ours.t_below(values, 3.28))
    if values:
        assert math.isnan(ours.welch(values, values).p)


def test_rank_test_agrees_with_all_permutations_with_ties_at_infinity():
    a, b = [3.0, 5.0, math.inf], [4.0, 6.0, math.inf, math.inf]
    values, u = np.array([*a, *b]), []
    for chosen in itertools.combinations(range(7), 3):
        others = [i for i in range(7) if i not in chosen]
        u.append(sum((values[i] < values[j]) + (values[i] == values[j]) / 2 for i in chosen for j in others))
    found = ours.rank_test(a, b)
    assert found.share == pytest.approx(u[0] / 12)
    tail = min(np.mean(np.array(u) >= u[0]), np.mean(np.array(u) <= u[0]))
    assert found.p == pytest.approx(min(1, 2 * tail), abs=1e-12)
    plain = ours.rank_test(A, B)
    assert plain.p == pytest.approx(stats.mannwhitneyu(A, B, method="exact").pvalue, abs=1e-12)
    assert math.isnan(ours.rank_test([1.0, 2.0], B).p)
    assert ours.rank_test([1.0], [math.inf]) == pytest.approx((1.0, math.nan), nan_ok=True)
    many = ours.rank_test(range(10), range(10, 20))
    assert many == pytest.approx((1.0, 2 / math.comb(20, 10)), rel=1e-9), "no floor"
    assert ours.ranks_needed(0.05) == 4 and ours.ranks_needed(0.11) == 3


@pytest.mark.parametrize("sizes", [(70, 70), (71, 70), (71, 71), (600, 600), (4000, 3), (3, 400), (2000, 3000)])
def test_rank_test_of_many_runs_is_right_and_ends_soon(sizes):
    generator = np.random.default_rng(sum(sizes))
    a, b = generator.normal(size=sizes[0]), generator.normal(0.3, size=sizes[1])
    begin_s = time.monotonic()
    found, swapped = ours.rank_test(a, b), ours.rank_test(b, a)
    assert time.monotonic() - begin_s < 10
    assert swapped.p == pytest.approx(found.p) and swapped.share == pytest.approx(1 - found.share)
    assert found.share == pytest.approx(np.mean(a[:, None] < b))
    method = "exact" if max(sizes) <= 400 and min(sizes) < 71 else "asymptotic"
    assert found.p == pytest.approx(stats.mannwhitneyu(a, b, method=method).pvalue, rel=1e-6)
    a[: len(a) // 2], b[len(b) // 3 :] = math.inf, math.inf
    tied = ours.rank_test(a, b)
    assert 0 < tied.p <= 1 and tied.p == pytest.approx(stats.mannwhitneyu(a, b, method="asymptotic").pvalue, abs=0.06)
    assert ours.rank_test(np.full_like(a, math.inf), np.full_like(b, math.inf)) == pytest.approx((0.5, 1.0))


def test_exact_and_normal_ranks_agree_where_they_meet(monkeypatch):
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 30, 60), generator.integers(0, 33, 60)
    exact = ours.rank_test(a, b).p
    monkeypatch.setattr(ours, "MAX_ADDITIONS", 0)
    assert ours.rank_test(a, b).p == pytest.approx(exact, rel=0.05)


def test_chosen_pairs_are_corrected_for_those_they_were_chosen_from():
    p = [0.001, 0.2, 0.01]
    assert ours.holm(p, untold=2) == pytest.approx([0.005, 0.6, 0.04])
    assert ours.holm_levels(p, 0.05, untold=2) == pytest.approx([0.01, 0.05 / 3, 0.0125])


@pytest.mark.filterwarnings("error")
def test_equal_values_have_no_interval_and_make_scipy_say_nothing():
    nearly = [0.1 + 0.2, 0.3, 0.3, 0.3]
    for values in ([2.0] * 6, nearly, [0.0] * 3):
        assert np.isnan(ours.mean_interval(values)[:2]).all() and ours.mean_interval(values).method == "equal values"
        assert math.isnan(ours.t_below(values, 3.28)) and math.isnan(ours.welch(values, values).p)
        assert math.isfinite(ours.welch(values, [1.0, 2.0, 3.0]).p)
    assert math.isnan(ours.ratio_interval([0.3] * 3, [0.1] * 3)[1].low)


def test_holm_agrees_with_its_definition_over_all_orders():
    p = [0.01, 0.04, 0.03, 0.005, 0.04]

    def by_definition(p):
        order = sorted(range(len(p)), key=lambda i: p[i])
        return [
            max(min(1.0, (len(p) - k) * p[order[k]]) for k in range(order.index(i) + 1)) for i in range(len(p))
        ]  # fmt: skip

    for order in itertools.permutations(p):
        assert ours.holm(order) == pytest.approx(by_definition(order), abs=1e-15)
    adjusted = ours.holm([0.01, math.nan, 0.02])
    assert adjusted[0] == 0.02 and math.isnan(adjusted[1]) and adjusted[2] == 0.02


def test_holm_asks_of_each_p_its_share_even_where_the_adjusted_one_is_capped():
    assert ours.holm_levels([0.6, 0.8, 0.7], 0.06) == pytest.approx([0.02, 0.06, 0.03])
    assert math.isnan(ours.holm_levels([0.6, math.nan], 0.06)[1])


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 5, 10])
def test_interval_of_the_mean_covers_it_as_often_as_it_says(n):
    samples = np.random.default_rng(n).normal(size=(2000, n))
    found = np.array([ours.mean_interval(sample)[:2] for sample in samples])
    assert np.mean((found[:, 0] < 0) & (found[:, 1] > 0)) == pytest.approx(0.95, abs=0.015)
    assert found[0] == pytest.approx(stats.t.interval(0.95, n - 1, samples[0].mean(), stats.sem(samples[0])), abs=1e-12)
    assert math.isnan(ours.mean_interval([1.0]).low)


def test_error_rates_are_nominal_over_twenty_thousand_trials():
    """Truth exactly at the target, or two equal rules with unequal spread: false claims happen as often as promised."""
    trials, generator = 20_000, np.random.default_rng(0)
    losses = 3.28 + 0.0013 * generator.normal(size=(trials, 5))
    t = stats.ttest_1samp(losses, 3.28, axis=1, alternative="less").pvalue
    spot = generator.integers(0, trials, 20)
    assert [ours.t_below(list(losses[i]), 3.28) for i in spot] == pytest.approx(list(t[spot]), abs=1e-12)
    assert np.mean(t < 0.05) == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / trials))
    margins = (3.28 - losses.mean(1)) * math.sqrt(5)
    nominal = stats.norm.sf(ours.GATE_THRESHOLD / ours.GATE_SIGMA)
    assert np.mean(margins >= ours.GATE_THRESHOLD) == pytest.approx(nominal, abs=4 * math.sqrt(nominal / trials))
    others = 3.28 + 0.0025 * generator.normal(size=(trials, 8))
    p = stats.ttest_ind(losses, others, axis=1, equal_var=False).pvalue
    assert [ours.welch(losses[i], others[i]).p for i in spot] == pytest.approx(list(p[spot]), abs=1e-12)
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.006)
    # Six comparisons of four equal rules: one false win in twenty tables, not in five.
    four = generator.normal(size=(4000, 4, 6))
    pairs = list(itertools.combinations(range(4), 2))
    p = np.stack([stats.ttest_ind(four[:, a], four[:, b], axis=1, equal_var=False).pvalue for a, b in pairs], axis=1)
    false_wins = np.mean([min(ours.holm(list(row))) < 0.05 for row in p])
    assert false_wins < 0.05 + 0.01 < np.mean(p.min(1) < 0.05)


def test_crossing_interpolates_between_validations():
    validations = [(0, 5.0, 0.0), (10, 4.0, 2.0), (20, 3.0, 5.0), (30, 3.5, 7.0)]
    assert ours.crossing(validations, 3.25) == ours.Crossing(17.5, 4.25, (10, 20))
    assert ours.crossing(validations, 4.0) == ours.Crossing(10.0, 2.0, (0, 10))
    assert ours.crossing(validations, 6.0) == ours.Crossing(0.0, 0.0, (0, 0))
    assert ours.crossing(validations, 2.0) is None
    assert ours.crossing(validations[2:], 3.5) == ours.Crossing(20.0, 5.0, (0, 20)), "who knows when before"
    assert [ours.Crossing(195, 0, (begin, 200)).is_coarse for begin in (190, 189)] == [False, True]
    assert ours.crossing([(0, math.nan, 0.0), (10, math.nan, 1.0)], 3.0) is None


def test_runs_that_never_arrive_are_counted_at_their_cap():
    found = ours.reached([3275.0] * 6 + [None] * 4, [3400.0] * 10)
    assert (found.count, found.runs) == (6, 10)
    assert found.expected == pytest.approx((6 * 3275 + 4 * 3400) / 6)
    assert found.restricted_mean == pytest.approx((6 * 3275 + 4 * 3400) / 10)
    assert found.median == 3275 and math.isnan(found.interval.low)
    none = ours.reached([None, None], [100, 100])
    assert none.expected == none.median == math.inf
    assert ours.reached([1.0, 2.0, 3.0, None], [9, 9, 9, 9]).median == 2.5


def test_common_step_needs_every_run():
    runs = [{0: 5.0, 10: 3.0 + 0.0001 * i, 20: 2.9 + 0.0001 * i} for i in range(4)]
    assert ours.common_step(runs, 3.1) == 10
    assert ours.common_step([*runs, {0: 5.0, 20: 2.9}], 3.1) == 20
    assert ours.common_step([*runs, {0: 5.0, 20: math.nan}], 3.1) is None
    assert ours.gate([2.0, 3.0, 3.9], 3.1).passes
    assert ours.common_step([{10: 2.0}, {10: 3.0}, {10: 3.9}], 3.1) is None, "seeds scatter too much"


def test_runs_needed_reaches_the_power_in_simulation():
    n, generator = ours.runs_needed(0.002, 0.0015), np.random.default_rng(0)
    a, b = generator.normal(0, 0.0015, (4000, n)), generator.normal(0.002, 0.0015, (4000, n))
    power = np.mean(stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue < 0.05)
    assert 0.77 < power < 0.87


def test_flaws_name_what_is_wrong_with_a_sample():
    good = [[5.0, 3.0 + i] for i in range(3)]
    assert ours.flaws([4, 5, 6], good) == []
    assert ours.flaws([None] * 3, good) == []
    assert "fewer than 3" in ours.flaws([0, 1], good[:2])[0]
    assert "seeds more than once: 4" in ours.flaws([4, 4, 5], good)[0]
    assert seed_gaps([3, 0, 1]) == [2] and seed_gaps([]) == []
    assert seed_gaps([10**6, 0], most=3) == [1, 2, 3]
    assert "losses of another" in ours.flaws([0, 1, 2], [good[0], good[0], good[1]])[0]
    assert ours.flaws([0, 1, 2], [[3.1], [3.1], [3.1]]) == ["2 runs with the losses of another"]
    assert ours.flaws([0, 1, 2], [[3.1], [], []]) == []


def test_intervals_of_proportions_and_of_ratios():
    assert ours.wilson(6, 10)[:2] == pytest.approx((0.3127, 0.8318), abs=1e-4)
    ratio, interval = ours.ratio_interval([2.0, 2.2, 1.8, 2.1], [1.0, 1.1, 0.9, 1.05])
    assert ratio == pytest.approx(2.0) and np.isnan(interval[:2]).all()
    logs = [0.1, 0.3, 0.2, -0.1]
    ratio, interval = ours.ratio_interval(np.exp(logs), [1.0] * 4)
    wanted = stats.t.interval(0.95, 3, np.mean(logs), stats.sem(logs))
    assert ratio == pytest.approx(np.exp(np.mean(logs))) and interval[:2] == pytest.approx(np.exp(wanted), abs=1e-12)
    assert math.isnan(ours.ratio_interval([2.0], [1.0])[1].low)
