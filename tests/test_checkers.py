"""checkers.py: what counts as right, by hand, and that no reply hangs or breaks them."""
import random
import time
from fractions import Fraction

import pytest

import checkers
from judges import Function


@pytest.mark.parametrize("reply, answer, right", [
    ("She has 48/2 = 24 left, so 72.\n#### 72", "72", 1),
    ("#### 7\nNo, wait.\n#### 72", "72", 1),  # the last mark counts
    ("#### 72\nOr was it 73?\n#### 73", "72", 0),
    ("#### $1,234.50", "1234.5", 1),
    ("#### 72.", "72", 1),
    ("#### 72 apples for 3 children", "72", 1),
    ("#### -5", "-5", 1),
    ("#### -5", "5", 0),
    ("So \\boxed{72}.", "72", 1),
    ("\\boxed{\\$72}", "72", 1),
    ("\\boxed{1} and then \\boxed{72}", "72", 1),
    ("\\boxed{\\frac{3}{4}}", "3", 0),  # a fraction is no number here
    ("#### 3/4", "3", 0),
    ("#### 34/5", "3", 0),
    ("#### 3^2", "3", 0),
    ("#### x = 72", "72", 0),  # the number does not come first
    ("The answer is 72", "72", 1),
    ("The answer is 72.00!", "72", 1),
    ("They pay 1,000,000 dollars.", "1000000", 1),
    ("One, 2, 3", "3", 1),
    ("1,2", "2", 0),
    ("10-3", "3", 1),  # a minus between numbers is no sign
    ("It fell to -3", "-3", 1),
    ("x2", "2", 0),
    ("72 or 73", "72", 0),
    ("72", "7", 0),
    ("", "72", 0),
    ("seventy-two", "72", 0),
    ("#### 72", "She has 12.\n#### 72", 1),  # an answer with its working
    ("#### 72", "", 0),
    ("", "", 0),
    ("#### x", "x", 0),  # an answer that is no number is never reached
])
def test_gsm8k_compares_the_number_behind_the_last_mark_or_else_the_last_one(reply, answer, right):
    assert checkers.gsm8k([reply], [answer]) == [right]


@pytest.mark.parametrize("reply, answer, right", [
    ("Paris", "Paris", 1),
    (" Paris\n", "Paris ", 1),
    ("paris", "Paris", 0),
    ("Paris.", "Paris", 0),
    ("", "", 0),
    ("72.0", "72", 0),
])
def test_exact_is_equal_but_for_blanks_around(reply, answer, right):
    assert checkers.exact([reply], [answer]) == [right]


@pytest.mark.parametrize("reply, answer, right", [
    ("12+7-4", "15", 1),
    ("12+7=19; 19-4=15", "15", 1),
    ("12+7=19; 19-4=15", "19", 0),
    ("We get 3 * (2 + 3) = 15.", "15", 1),
    ("First 1+1.\nThe answer is (12 + 7) - 4.", "15", 1),  # the last line
    ("First 15.\nThe answer is 16", "15", 0),
    ("Not 1+1 but 12+3", "15", 1),  # the last one of it
    ("7.5*2", "15", 1),
    ("0.1+0.2", "0.3", 1),  # exact, unlike floats
    ("1/3+1/3+1/3", "1", 1),
    ("6/8", "3/4", 1),
    ("-(2-5)", "3", 1),
    ("=.5", "1/2", 1),
    ("10 - 2 - 3", "5", 1),  # from the left
    ("2+3*4", "14", 1),
    ("1/0", "0", 0),
    ("2**3", "8", 0), ("2**3", "3", 0), ("2**3", "2", 0),
    ("17//2", "8", 0), ("17//2", "2", 0), ("17%5", "2", 0), ("17%5", "5", 0),
    ("x2", "2", 0), ("2x", "2", 0),
    ("(1+2", "3", 0),
    ("1,000", "1000", 0), ("1,000", "0", 0),
    ("15", "fifteen", 0),
    ("no number", "15", 0), ("", "", 0), ("", "0", 0),
])
def test_arithmetic_is_worth_as_much_as_the_answer(reply, answer, right):
    assert checkers.arithmetic([reply], [answer]) == [right]


@pytest.mark.parametrize("reply, right", [("#### 72", 1), ("So \\boxed{72}.", 1), ("#### 72\n#### 72", 0),
                                          ("\\boxed{72} #### 72", 0), ("\\boxed{7} \\boxed{7}", 0), ("72", 0),
                                          ("", 0), ("#### ", 0), ("\\boxed{}", 0), ("\\boxed{72", 0),
                                          ("#### Steps\nfirst\nsecond", 0)])
def test_one_result_is_marked_once(reply, right):
    assert checkers.marked_once([reply]) == [right]


def test_expressions_are_worth_what_a_slow_evaluation_by_hand_says():
    rng = random.Random(0)

    def made(depth):
        """(text, value) of a random expression."""
        if depth == 0:
            number = rng.randint(0, 99)
            return str(number), Fraction(number)
        (left, a), (right, b) = made(depth - 1), made(depth - 1)
        sign = rng.choice("+-*/" if b else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b
        return f"({left} {sign} {right})", value

    for _ in range(200):
        text, value = made(rng.randint(0, 3))
        assert checkers.value_of(text) == value
        assert checkers.arithmetic([f"It is {text}."], [str(value)]) == [1]


@pytest.mark.parametrize("text", [
    "2**3",
    "7//2",
    "7%2",
    "1<2",
    "1 if 1 else 2",
    "(1,2)",
    "[1]",
    "f(1)",
    "1e9",
    "1_0",
    "0x10",
    "True",
    "a",
    "1j",
    "",
    "()",
    "1 2",
    "007",
    "__import__('os')",
    "1;2",
    "(1)(2)",
    "１+２",
    "²",
    "1" + "+1" * 200,
])
def test_what_is_no_arithmetic_has_no_value(text):
    assert checkers.value_of(text) is None


HOSTILE = [
    "9**9**9**9",
    "(" * 10000,
    "(" * 10000 + "1" + ")" * 10000,
    "(" * 99 + "1" + ")" * 99,
    "-" * 10000 + "1",
    "- " * 99 + "1",
    "9" * 100000,
    "1" + "*9" * 50000,
    "1/" * 50000 + "0",
    "１２",
    "٣",
    "NaN",
    "nan",
    "inf",
    "1e999",
    "#### NaN",
    "#### 1e999",
    "\\boxed{" * 10000,
    "\\boxed{" + "{" * 10000,
    "#" * 100000,
    "1," * 50000,
    "1,000" * 20000,
    "." * 100000,
    "1." * 50000,
    " " * 100000,
    "1" + " " * 100000 + "2",
    "\0",
    "\ud800",
    "=" * 100000,
    "\n" * 100000,
    "so " * 50000,
    "$" * 100000,
    "9" * 99 + "*" + "9" * 99,
    "1" + " " * 190 + "2",
]


@pytest.mark.parametrize("name", ["gsm8k", "exact", "arithmetic", "marked_once"])
def test_hostile_replies_neither_hang_nor_raise(name):
    function = Function("--reward-fn", f"checkers:{name}")
    began = time.process_time()
    for answer in ("72", "", "NaN", "9" * 1000):
        count = len(HOSTILE)
        scores = function(["?"] * count, HOSTILE, [answer] * count, [True] * count)
        right = {
            "marked_once": lambda reply: reply.startswith("#### "),
            "exact": lambda reply: reply == answer != ""
        }.get(name)
        assert scores.tolist() == [float(right is not None and right(reply)) for reply in HOSTILE]
    assert time.process_time() - began < 10
