"""docs/faults.md and docs/questions.md: the numbers of the table are those that bench/faults.py prints, and
the tests that both name exist."""
import functools
import re

import pytest

import bench.faults
import tools

PAGES = ("faults.md", "questions.md")


@functools.cache
def table():
    return bench.faults.table()


def page(name):
    return (tools.ROOT / "docs" / name).read_text("utf-8")


def test_the_table_of_the_page_is_what_the_command_prints():
    printed = ["| " + " | ".join(cells) + " |" for cells in table()]
    lines = page("faults.md").splitlines()
    begin = lines.index("|---|---|---|---|") + 1
    assert lines[begin:begin + len(printed)] == printed
    assert lines[begin + len(printed)] == ""


def test_in_every_fault_theirs_differs_from_what_is_right():
    for name, _, theirs, right in table():
        assert theirs != right, name


def test_every_fault_is_explained_with_a_test_that_would_notice_it():
    """Those of one paragraph (three ways of sampling) share its tests."""
    text = page("faults.md")
    explained = " ".join(re.findall(r"\*\*(.+?)\*\*", text)).lower()
    for name in bench.faults.FAULTS:
        assert name.removeprefix("sampled with ").lower() in explained, name
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("**"):
            assert re.search(r"`tests/\S+\.py::test_\w+`", paragraph), paragraph


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_exists(name):
    named = re.findall(r"tests/([\w/]+\.py)::(\w+)", page(name))
    assert named
    for file, test in named:
        assert f"\ndef {test}(" in (tools.TESTS / file).read_text("utf-8"), f"{file}::{test}"


def test_numbers_of_the_table_that_the_questions_quote_are_in_it():
    """Written as `(fault: theirs, right)`."""
    rows = {row[0]: row[2:] for row in table()}
    text = " ".join(page("questions.md").split())
    quoted = re.findall(r"\(([^()]+): (\S+), (\S+) right\)", text)
    assert len(quoted) > 5
    for fault, theirs, right in quoted:
        assert rows[fault] == (theirs, right), fault
