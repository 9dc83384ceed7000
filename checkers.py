"""Checkers of replies whose result is known: functions to be named, as in --reward-fn checkers:gsm8k.

    gsm8k        the number that a reply comes to is the answer
    exact        the reply is the answer, letter by letter
    arithmetic   the expression or the value at the reply's end is worth as much as the answer
    marked_once  the reply marks one result, and no more

Each returns 1.0 or 0.0 for a reply. Answers are those of the rows of --data; a row without an answer gives no
reply a 1. What a policy writes is never executed: numbers are found by their letters, expressions are read as
syntax trees of + - * / alone. Letters and lengths are bounded, so no reply takes long.
"""
import ast
import operator
import re
from fractions import Fraction

from formats.rows import find_result

# Expressions that are longer than this, in characters, have no value here.
LONGEST = 200
# ASCII digits alone: those of other scripts are letters here. Nothing around a number makes it a part of a
# formula.
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?"
NUMBER = re.compile(rf"(?<![\w.,^/\\])(-?)\$?({DIGITS})(?!\.?[0-9]|,[0-9]{{3}}|\s?[\^*/\\])")
# Numbers with operators and brackets around them. What it finds need not be well formed.
TERM = r"[-+( ]*(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)[) ]*"
EXPRESSION = re.compile(rf"(?<![\w.,*/^%+-]){TERM}(?:[-+*/]{TERM})*(?![\w*/^%]|,[0-9])")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value_of(text):
    """The value of an expression of numbers, + - * / and brackets, as a Fraction; None if it is none."""
    text = text.strip()
    if len(text) > LONGEST or not re.fullmatch(r"[0-9.+\-*/() ]+", text):
        return None
    try:
        return value_of_node(ast.parse(text, mode="eval").body, text)
    # What is no expression, divides by zero, or has more brackets than Python reads.
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return None


def value_of_node(node, text):
    """The value of a node of the syntax tree of a text; ValueError if it is anything but arithmetic."""
    if isinstance(node, ast.Constant):
        # From its letters, as a float has lost some of them.
        return Fraction(ast.get_source_segment(text, node))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = value_of_node(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = value_of_node(node.left, text), value_of_node(node.right, text)
        return OPERATORS[type(node.op)](left, right)
    raise ValueError("no arithmetic")


def marked_result(text):
    """What a text marks as its result, behind the last #### or in the last \\boxed{}; None if nothing."""
    result = find_result(text)
    return None if result == text.strip() else result


def number_of(text):
    """The number that a text comes to, as a Fraction; None if it comes to none.

    It is the one with which the marked result begins, or else the last one of the text. Thousands may be set
    off by commas, a dollar sign may come first, and a dot or a word may follow.
    """
    result = marked_result(text)
    if result is None:
        found = None
        for found in NUMBER.finditer(text):
            pass
    else:
        found = NUMBER.match(result.removeprefix("\\").strip())
    if found is None:
        return None
    sign, digits = found.groups()
    return Fraction(sign + digits.replace(",", ""))


def gsm8k(replies, answers):
    """1 where a reply comes to the same number as the answer, 72 and 72.00 being the same.

    The number is that behind the last #### or in the last \\boxed{}, or else the last one of the reply.
    Fractions and powers are no numbers here.
    """
    scores = []
    for reply, answer in zip(replies, answers):
        wanted = number_of(answer)
        scores.append(float(wanted is not None and number_of(reply) == wanted))
    return scores


def exact(replies, answers):
    """1 where a reply is the answer, but for blanks around it."""
    scores = []
    for reply, answer in zip(replies, answers):
        wanted = answer.strip()
        scores.append(float(wanted != "" and reply.strip() == wanted))
    return scores


def arithmetic(replies, answers):
    """1 where the last expression of a reply is worth as much as the answer: 15, 12+7-4 or 7.5*2 where it is
    15.

    It is looked for behind the last =, or in the last line of a reply that has none; what is longer than 200
    characters there has no value. The answer may be an expression too (3/4).
    """
    scores = []
    for reply, answer in zip(replies, answers):
        wanted = value_of(answer)
        scores.append(float(wanted is not None and last_value(reply) == wanted))
    return scores


def last_value(reply):
    """The value of the last expression of a reply, see `arithmetic`; None if there is none."""
    reply = reply.strip()
    _, equals, end = reply.rpartition("=")
    if not equals:
        end = reply.rpartition("\n")[2]
    if len(end) > LONGEST:
        return None
    expressions = EXPRESSION.findall(end)
    return value_of(expressions[-1]) if expressions else None


def marked_once(replies):
    """1 where a reply marks a result, behind #### or in \\boxed{}, and does so once."""
    scores = []
    for reply in replies:
        marks = reply.count("####") + reply.count("\\boxed{")
        scores.append(float(marks == 1 and bool(marked_result(reply))))
    return scores
