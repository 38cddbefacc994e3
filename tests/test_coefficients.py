"""The tables: published ones come out of the generator, and what would turn a sign is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimorph.linalg import Coefficients, NewtonSchulz, polar_express
from optimorph.linalg._coefficients import EXACT
from optimorph.linalg._newton_schulz import PRESETS

PUBLISHED = {
    "Polar Express": (
        {},
        [
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.89130141, -1.26799583, 0.37680409),
        ],
    ),
    "optimal_composition": (
        {"cushion": 0.02},
        [
            (8.31968561540051, -23.859450318966715, 17.531445041810237),
            (4.122734000276105, -2.9805716163250144, 0.552099774600083),
            (3.961613803377923, -2.940290980104283, 0.5591292972812772),
            (3.3104381510188765, -2.482536458720386, 0.5093749062858699),
            (2.2937760286198134, -1.6627277433762755, 0.4181400548467765),
        ],
    ),
    "CANS": (
        {"cushion": 0.0},
        [
            (8.4703288, -25.10807471, 18.6292756),
            (4.18283418, -3.10870111, 0.58060668),
            (3.96185728, -2.95406375, 0.56297612),
            (3.28658622, -2.46472013, 0.50735769),
            (2.27374999, -1.64466037, 0.41619093),
        ],
    ),
}


@pytest.mark.parametrize(("arguments", "rows"), PUBLISHED.values(), ids=PUBLISHED)
def test_one_generator_yields_the_published_tables(arguments, rows):
    found = polar_express(1e-3, 6, safety=0.0, **arguments).rows
    np.testing.assert_allclose(found[: len(rows)], rows, rtol=1e-6)


def test_safety_divides_all_steps_but_the_last():
    plain, safe = polar_express(safety=0.0).rows, polar_express(safety=0.05).rows
    np.testing.assert_allclose(safe[:-1], np.array(plain[:-1]) / [1.05, 1.05**3, 1.05**5], rtol=1e-12)
    assert safe[-1] == plain[-1]


def test_the_limit_is_the_taylor_polynomial():
    np.testing.assert_allclose(polar_express(1e-3, 12, safety=0.0).rows[-1], (15 / 8, -10 / 8, 3 / 8))
    np.testing.assert_allclose(polar_express(1e-2, 16, degree=3, safety=0.0).rows[-1], (3 / 2, -1 / 2, 0))


@settings(deadline=None, max_examples=40)
@given(
    power=st.floats(-6, -0.01),
    steps=st.integers(1, 8),
    degree=st.sampled_from([3, 5]),
    seed=st.integers(0, 9),
)
def test_without_a_cushion_the_error_equioscillates(power, steps, degree, seed):
    """Both sides of 1 are reached to the same distance, which is 1 - p(lower): no polynomial does better."""
    lower = 10.0**power
    table = polar_express(lower, steps, degree=degree, safety=0.0, cushion=0.0)
    low, high = table.band
    bound = 1 - float(table(np.array([lower]))[0])
    assert abs((1 - low) - bound) < 1e-6
    if bound > 1e-6:
        assert abs((high - 1) - bound) < 1e-4 * bound + 1e-6


def brute_force(lower, degree):
    """The least max |1 - p| over [lower, 1] by linear programming on a grid."""
    from scipy.optimize import linprog

    sigma = np.linspace(lower, 1, 2001)
    powers = np.stack([sigma**k for k in range(1, degree + 1, 2)], axis=1)
    upper = np.block([[powers, -np.ones((2001, 1))], [-powers, -np.ones((2001, 1))]])
    right = np.concatenate([np.ones(2001), -np.ones(2001)])
    cost = [0.0] * powers.shape[1] + [1.0]
    return linprog(cost, A_ub=upper, b_ub=right, bounds=[(None, None)] * len(cost)).fun


@pytest.mark.parametrize("degree", [3, 5])
@pytest.mark.parametrize("lower", [0.01, 0.1, 0.5])
def test_a_step_is_the_best_polynomial_there_is(lower, degree):
    table = polar_express(lower, 1, degree=degree, safety=0.0, cushion=0.0)
    low, high = table.band
    assert max(1 - low, high - 1) == pytest.approx(brute_force(lower, degree), rel=1e-4)


def test_an_unsafe_table_says_where():
    aol = (4.0098, -7.0585, 2.4635)  # of the kind that was published: negative above σ = .9
    with pytest.raises(ValueError, match=r"step 1, .* flips signs: it turns σ = 1") as error:
        Coefficients((aol,))
    assert "a + b σ² + c σ⁴ > 0" in str(error.value)
    with pytest.raises(ValueError, match=r"step 2, .* flips signs"):
        Coefficients(((1.9, 0.0, 0.0), (3.4, -1.2, 0.0)))
    with pytest.raises(ValueError, match=r"step 1, .* diverges"):
        NewtonSchulz(((2.0, 1.0, 0.0),))


def test_room_for_rounding_depends_on_the_dtype():
    rows = polar_express(safety=0.0, cushion=0.0).rows
    assert Coefficients(rows).dtype == "float32"
    with pytest.raises(ValueError, match=r"diverges: .* in bfloat16"):
        Coefficients(rows, dtype="bfloat16")
    assert polar_express().dtype == "bfloat16"
    assert polar_express(1e-10, 12, safety=0.0, cushion=0.0).dtype == EXACT


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    table = PRESETS[name](5)
    low, high = table.band
    assert 0.4 < low < 1 < high < 1.21
    assert table.slope > 400
    assert len(PRESETS[name](7).rows) == 7


def test_tables_are_cut_to_the_steps():
    rows = polar_express(steps=3).rows
    assert NewtonSchulz(polar_express(steps=3), steps=2).table.rows == rows[:2]
    assert NewtonSchulz(polar_express(steps=3), steps=4).table.rows == (*rows, rows[-1])


def test_predicted_conditions():
    """The figures of the Gram Newton-Schulz autotune, to its two digits."""
    assert PRESETS["jordan"](5).conditions((3,))[0] == pytest.approx(62, rel=0.1)
    assert PRESETS["you"](5).conditions((2,))[0] == pytest.approx(53, rel=0.02)
    assert polar_express(safety=0.05).conditions((2,))[0] == pytest.approx(85, rel=0.03)
    assert polar_express(cushion=0.02, safety=0.02).conditions((2,))[0] == pytest.approx(119, rel=0.01)
    assert polar_express().restarts() == (2,)
    assert PRESETS["jordan"](5).restarts() == (3,)
    assert max(polar_express(steps=8).conditions()) < 120


def test_described():
    text = polar_express().describe()
    for words in (
        "safe in",
        "bfloat16",
        "[0.8285, 1.1236]",
        "worst |1 - σ|",
        "0.1715",
        "slope at 0",
        "947.9",
        "Gram",
    ):
        assert words in text
    assert "condition before each" in text
