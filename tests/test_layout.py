"""The house: which way imports run, what stands where, and how wide a line may be."""
import ast
import collections
import runpy

import pytest

import tools

ALGORITHMS = (
    "sft", "reward", "aims", "process", "ppo", "grpo", "dpo", "kto", "best_of_n", "constitution", "distill",
    "evaluate", "label", "chat", "report", "toy", "sums", "constraints", "feedback",
)
# A file may import from the rooms before its own.
# In plumbing/ and formats/ files import each other, in no circle.
ROOMS = (
    "plumbing", "head", "model", "formats", "data", "generate", "rollout", "judges", "checkers", "agreement",
    "reactions", "algorithms",
)
# Functions that stand in two algorithms on purpose, and what shows that both give the same numbers.
TWINS = {
    "kl_estimate": "test_grpo.py::test_kl_terms_are_those_of_ppo",
    "importance_weights":
        "whole/test_recorded_replies.py::test_weights_are_bounded_and_those_of_one_script_are_the_others",
    "reply_logprobs": "test_kto.py::test_what_stands_in_dpo_too_is_the_same",
    "open_reference": "test_kto.py::test_what_stands_in_dpo_too_is_the_same",
    "kl_loss": "test_grpo.py::test_kl_terms_are_those_of_ppo",
    "policy_loss": "test_grpo.py::test_with_a_ratio_of_each_token_the_clipped_loss_is_that_of_ppo",
}
# Phases that each algorithm has, and does in its own way.
PHASES = {
    "main", "Config", "check", "Models", "load_models", "Old", "forward", "Update", "update", "metrics_of"
}
COLUMNS = 110


def module_of(file):
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module):
    top = module.partition(".")[0]
    return "algorithms" if top in ALGORITHMS else top


@pytest.fixture(scope="module")
def imports():
    """{module of the project: those of the project that it imports, anywhere in it}."""
    modules = {module_of(file): text for file, text in tools.sources().items()}
    graph = {}
    for module, text in modules.items():
        named = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                named |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                named |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        graph[module] = named & modules.keys()
    return graph


def test_imports_run_one_way(imports):
    assert {room_of(module) for module in imports} == set(ROOMS)
    wrong = []
    for module, others in imports.items():
        for other in others:
            if ROOMS.index(room_of(other)) > ROOMS.index(room_of(module)):
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_plumbing_imports_nothing_else_of_ours(imports):
    for module, others in imports.items():
        if room_of(module) == "plumbing":
            assert {room_of(other) for other in others} <= {"plumbing"}, module


def test_no_circle(imports):
    left = dict(imports)
    while left:
        free = [module for module, others in left.items() if not others & left.keys() - {module}]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_no_algorithm_imports_another_and_nothing_imports_the_toy_task(imports):
    for module, others in imports.items():
        assert not others & set(ALGORITHMS), module


def test_only_what_shows_a_page_has_a_server(imports):
    assert {module for module, others in imports.items() if "plumbing.web" in others} == {"label", "chat"}


def test_what_stands_in_two_algorithms_is_a_twin_that_is_compared():
    where = collections.defaultdict(list)
    for file, text in tools.sources().items():
        if module_of(file) in ALGORITHMS:
            for node in ast.parse(text).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    where[node.name].append(file)
    twice = {name for name, files in where.items() if len(files) > 1}
    assert twice - PHASES == set(TWINS)
    for test in TWINS.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (tools.TESTS / file).read_text()


def with_tests():
    """As `tools.sources`, and the tests."""
    tests = {file.relative_to(tools.ROOT).as_posix(): file for file in sorted(tools.TESTS.rglob("*.py"))}
    return tools.sources() | {name: file.read_text("utf-8") for name, file in tests.items()}


@pytest.mark.parametrize("file", with_tests())
def test_no_line_is_wider_than_a_page(file):
    lines = with_tests()[file].splitlines()
    wide = [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert wide == []


@pytest.mark.parametrize("table", sorted(
    path.relative_to(tools.TESTS / "mutants").as_posix() for path in (tools.TESTS / "mutants").rglob("*.py")
    if path.name != "__main__.py"))
def test_mutants_fit_the_code_and_name_tests_that_there_are(table):
    source = (tools.ROOT / table).read_text("utf-8")
    for name, test, old, new in runpy.run_path(str(tools.TESTS / "mutants" / table))["MUTANTS"]:
        assert source.count(old) == 1 and old != new, name
        file, _, function = test.partition("::")
        assert f"def {function.partition('[')[0]}" in (tools.TESTS / file).read_text("utf-8"), name
