"""Bugs for checkers.py: rows (name, test that ought to kill it, old, new)."""
GSM8K = "test_checkers.py::test_gsm8k_compares_the_number_behind_the_last_mark_or_else_the_last_one"
ARITHMETIC = "test_checkers.py::test_arithmetic_is_worth_as_much_as_the_answer"
VALUES = "test_checkers.py::test_expressions_are_worth_what_a_slow_evaluation_by_hand_says"
NO_ARITHMETIC = "test_checkers.py::test_what_is_no_arithmetic_has_no_value"
HOSTILE = "test_checkers.py::test_hostile_replies_neither_hang_nor_raise"
EXACT = "test_checkers.py::test_exact_is_equal_but_for_blanks_around"
MARKED = "test_checkers.py::test_one_result_is_marked_once"

MUTANTS = [
    ("checkers: powers are read, too", NO_ARITHMETIC, "ast.Div: operator.truediv}", "ast.Div: operator.truediv, ast.Pow: operator.pow}"),
    ("checkers: subtraction the wrong way round", VALUES, "(left, right)\n", "(right, left)\n"),
    ("checkers: a sign is lost", ARITHMETIC, "return -value if isinstance(node.op, ast.USub) else value", "return value"),
    ("checkers: decimals are floats", ARITHMETIC, "Fraction(ast.get_source_segment(text, node))", "Fraction(node.value)"),
    ("checkers: expressions of any length", NO_ARITHMETIC, "len(text) > LONGEST or not", "not"),
    ("checkers: a division by zero is an error", ARITHMETIC, "ValueError, ZeroDivisionError, MemoryError", "ValueError, MemoryError"),
    ("checkers: the first number of a reply counts", GSM8K, "            pass\n", "            break\n"),
    ("checkers: a marked result may be anywhere", GSM8K, "found = NUMBER.match(", "found = NUMBER.search("),
    ("checkers: marks are overlooked", GSM8K, "return None if result == text.strip() else result", "return None"),
    ("checkers: numbers lose their sign", GSM8K, 'Fraction(sign + digits.replace(",", ""))', 'Fraction(digits.replace(",", ""))'),
    ("checkers: a fraction is its numerator", GSM8K, r"|\s?[\^*/\\])", ")"),
    ("checkers: thousands end at the comma", GSM8K, "(?:,[0-9]{3}){1,9}|", "|"),
    ("checkers: nothing equals nothing", GSM8K, "scores.append(float(wanted is not None and number_of(reply) == wanted))",
     "scores.append(float(number_of(reply) == wanted))"),
    ("checkers: an empty reply is an empty answer", EXACT, 'wanted != "" and reply', "reply"),
    ("checkers: blanks count", EXACT, "reply.strip() == wanted))", "reply == wanted))"),
    ("checkers: the first line counts", ARITHMETIC, 'reply.rpartition("\\n")[2]', 'reply.partition("\\n")[0]'),
    ("checkers: what stands before the = counts", ARITHMETIC, "_, equals, end = reply.rpartition", "end, equals, _ = reply.rpartition"),
    ("checkers: a part of an operator is one", ARITHMETIC, r"(?<![\w.,*/^%+-])", r"(?<![\w.,])"),
    ("checkers: the first expression counts", ARITHMETIC, "value_of(expressions[-1])", "value_of(expressions[0])"),
    ("checkers: a result may be marked twice", MARKED, "marks == 1 and", "marks >= 1 and"),
    ("checkers: a mark without a result counts", MARKED, "float(marks == 1 and bool(marked_result(reply)))", "float(marks == 1)"),
]
