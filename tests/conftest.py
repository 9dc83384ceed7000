import collections
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))
import tools  # noqa: E402,F401: makes the files that all processes of the tests use

torch.set_num_threads(1)  # tiny models: one thread is fastest, and repeats bit for bit

CASES = {  # what tests marked `case` show, `bash run.sh faults` prints as a table
    1: "kill -9 at random moments", 2: "kill -9 inside a save", 3: "SIGTERM in a step, rollout, evaluation or save", 4: "Ctrl-C twice",
    5: "SIGTERM to torchrun, 2 ranks", 6: "a rank dies or stalls", 7: "truncated checkpoint file", 8: "one flipped byte in the weights",
    9: "manifest or state damaged, missing or of an unknown version", 10: "a malicious pickle, whatever it is called", 11: "hostile safetensors and JSON",
    12: "a checkpoint of the wrong kind or shape", 13: "disk full", 14: "output folder read-only, a file, in use, or another run's",
    15: "NaN weight, NaN reward, infinite loss", 16: "gradients explode", 17: "KL blow-up, reward collapse", 18: "malformed JSON lines",
    19: "rows that make no sense", 20: "too long prompts and replies", 21: "empty, tiny and uneven data", 22: "special tokens in users' text",
    23: "the end token", 24: "padding changes nothing", 25: "accumulation, DDP and FSDP2 give one gradient", 26: "resume with changed settings",
    27: "FSDP2 to one process and back", 28: "no network, tokenizer cache or GPU", 29: "out of memory", 30: "bad flags",
    31: "nothing to normalise: one sample, equal rewards, no tokens", 33: "one trajectory: accumulated, 2 ranks, sharded, compiled, padded, cached",
    34: "a second device: nothing mixes devices, no wait inside a step", 35: "two machines, of which one dies and comes back",
    36: "a console that lacks letters, output that nobody reads"}


def pytest_addoption(parser):
    parser.addoption("--faults", action="store_true", help="run the tests of faults alone, the long ones too, and print a table of cases")


def pytest_configure(config):
    config.addinivalue_line("markers", "case(number, ...): shows how a fault is survived; see CASES in conftest.py")
    config.addinivalue_line("markers", "long: takes more than some seconds; runs with --faults alone")
    config.survived = collections.defaultdict(lambda: [0, 0])  # case: tries, survived


def pytest_collection_modifyitems(config, items):
    if config.getoption("--faults"):
        config.hook.pytest_deselected(items=[item for item in items if not list(item.iter_markers("case"))])
        items[:] = [item for item in items if list(item.iter_markers("case"))]
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: bash run.sh faults"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count tries per case: a test is one, unless it records `tries` and `survived` itself (record_property)."""
    report = yield
    numbers = {number for marker in item.iter_markers("case") for number in marker.args}
    if numbers and (report.when == "call" or report.outcome == "failed"):
        counted = dict(item.user_properties)
        for number in numbers:
            item.config.survived[number][0] += counted.get("tries", 1)
            item.config.survived[number][1] += counted.get("survived", int(report.outcome == "passed"))
    return report


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--faults"):
        terminalreporter.section("faults")
        for number, text in CASES.items():
            tries, survived = config.survived[number]
            terminalreporter.write_line(f"{number:3}  {text:75} tries {tries:3}  survived {survived:3}{'' if tries == survived > 0 else '  <--'}")
        terminalreporter.write_line(" 32  the page for labelling: there is none yet")


@pytest.fixture(autouse=True)
def no_module_of_another_test():
    """Users' modules are called `mine` in the tests, and a process imports a name once."""
    yield
    sys.modules.pop("mine", None)


@pytest.fixture(scope="session")
def peers():
    """transformers, without network and noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = pytest.importorskip("transformers", reason="the peer that checkpoint folders are compared with")
        found.logging.set_verbosity_error()
        getattr(found.logging, "disable_progress_bar", lambda: None)()
        yield found
