"""What all tests share: the table of faults, fixtures, and where modules are found."""
import collections
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
# `tools` makes the files that all processes of the tests use.
import chat  # noqa: E402
from data import encode_prompt  # noqa: E402
from examples import JUDGES  # noqa: E402
from formats.tokenizer import Tokenizer  # noqa: E402
from small_models import BATCH_LENGTHS  # noqa: E402
from tools import (  # noqa: E402
    ALL_AT_ONCE, DEMONSTRATIONS, QUICK, TINY_RUN, TOY, TRAINERS, WORDS, command, run_here,
    signal_handlers_kept)

torch.set_num_threads(1)  # tiny models: one thread is fastest, and repeats bit for bit

# What tests marked `case` show, `bash run.sh faults` prints as a table.
CASES = {
    1: "kill -9 at random moments",
    2: "kill -9 inside a save",
    3: "SIGTERM in a step, rollout, evaluation or save",
    4: "Ctrl-C twice",
    5: "SIGTERM to torchrun, 2 ranks",
    6: "a rank dies or stalls",
    7: "truncated checkpoint file",
    8: "one flipped byte in the weights",
    9: "manifest or state damaged, missing or of an unknown version",
    10: "a malicious pickle, whatever it is called",
    11: "hostile safetensors and JSON",
    12: "a checkpoint of the wrong kind or shape",
    13: "disk full",
    14: "output folder read-only, a file, in use, or another run's",
    15: "NaN weight, NaN reward, infinite loss",
    16: "gradients explode",
    17: "KL blow-up, reward collapse",
    18: "malformed JSON lines",
    19: "rows that make no sense",
    20: "too long prompts and replies",
    21: "empty, tiny and uneven data",
    22: "special tokens in users' text",
    23: "the end token",
    24: "padding changes nothing",
    25: "accumulation, DDP and FSDP2 give one gradient",
    26: "resume with changed settings",
    27: "FSDP2 to one process and back",
    28: "no network, tokenizer cache or GPU",
    29: "out of memory",
    30: "bad flags",
    31: "nothing to normalise: one sample, equal rewards, no tokens",
    32: "the page for labelling: kills, double votes, two tabs, bad requests, other hosts, script in text",
    33: "one trajectory: accumulated, 2 ranks, sharded, compiled, padded, cached",
    34: "a second device: nothing mixes devices, no wait inside a step",
    35: "two machines, of which one dies and comes back",
    36: "a console that lacks letters, output that nobody reads",
}


def pytest_addoption(parser):
    text = "run the tests of faults and all long ones alone, and print a table of cases"
    parser.addoption("--faults", action="store_true", help=text)


def pytest_configure(config):
    case = "case(number, ...): shows how a fault is survived; see CASES in conftest.py"
    config.addinivalue_line("markers", case)
    config.addinivalue_line("markers", "long: takes more than some seconds; runs with --faults alone")
    config.survived = collections.defaultdict(lambda: [0, 0])  # case: tries, survived


def pytest_collection_modifyitems(config, items):
    if config.getoption("--faults"):
        kept = {item for item in items for name in ("case", "long") if item.get_closest_marker(name)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: bash run.sh faults"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count tries per case: a test is one, unless it records its own by `tries` and `survived`."""
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
            note = "" if tries == survived > 0 else "  <--"
            line = f"{number:3}  {text:75} tries {tries:3}  survived {survived:3}{note}"
            terminalreporter.write_line(line)


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
        found = pytest.importorskip("transformers",
                                    reason="the peer that checkpoint folders are compared with")
        found.logging.set_verbosity_error()
        getattr(found.logging, "disable_progress_bar", lambda: None)()
        yield found


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    """A run takes over signals; the next test begins without that."""
    with signal_handlers_kept():
        yield


# -- folders of small runs

@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder with a three-step run of every stage, each in a subprocess; the outputs by stage."""
    root, said = tmp_path_factory.mktemp("chain"), {}

    def run(stage, *flags):
        done = command(stage, *flags)
        assert done.returncode == 0, f"{stage}: {done.stderr}"
        said[stage] = done.stdout

    held_out = f"--val-data {TOY}/demonstrations_heldout.jsonl"
    run("sft", TINY_RUN, QUICK["sft"], DEMONSTRATIONS, held_out, f"--out {root}/sft --steps 3")
    run("toy", f"--model {root}/sft --out {root}/preferences",
        "--groups 200 --heldout-groups 40 --samples 2 --max-new-tokens 12 --threads 1")
    preferences = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl"
    files = f"{preferences} --model {root}/sft --threads 1 --steps 3"
    run("reward", files, QUICK["reward"], f"--demonstrations {TOY}/demonstrations.jsonl --out {root}/reward")
    run("ppo", f"--model {root}/sft --reward {root}/reward --data {TOY}/prompts.jsonl --judge toy:gold",
        QUICK["ppo"], f"--threads 1 --steps 3 --out {root}/ppo")
    run("grpo", f"--model {root}/sft --reward {root}/reward --data {TOY}/prompts.jsonl --judge toy:gold",
        QUICK["grpo"], f"--threads 1 --steps 3 --out {root}/grpo")
    run("dpo", files, QUICK["dpo"], f"--out {root}/dpo")
    run("kto", files, QUICK["kto"], f"--out {root}/kto")
    run("process", f"--model {root}/sft --data {TOY}/steps.jsonl --val-data {TOY}/steps_heldout.jsonl",
        QUICK["process"], f"--threads 1 --steps 3 --out {root}/process")
    run("evaluate", f"--models {root}/sft {root}/ppo {root}/dpo --out {root}/evaluation.json",
        f"--data {TOY}/prompts_heldout.jsonl --judge toy:gold",
        "--prompts 20 --max-new-tokens 12 --threads 1")
    run("report", f"--demo {root} --seconds 12")
    return root, said


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a model whose replies mostly end, another one, a reward model, and files to train on."""
    root = tmp_path_factory.mktemp("small")
    prompts = [f"Say {'please ' * (i % 3)}{word}." for i, word in enumerate(WORDS)]
    replies = ["It is good.", "No.", "It is sad, and so it is."]
    ranks = [[0, 1], [1, 0, 2], [0, 1, 1]]
    files = {
        "prompts": [{"prompt": p} for p in prompts],
        "demonstrations": [{"instruction": p, "output": r} for p in prompts for r in replies],
        "rankings": [],
    }
    for i, prompt in enumerate(prompts):
        chosen = ranks[i % 3]
        row = {"prompt": prompt, "completions": replies[:len(chosen)], "ranks": chosen, "margin": 0.5 * i}
        files["rankings"].append(row)
    for name, rows in files.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    with signal_handlers_kept():
        demonstrations = f"--data {root}/demonstrations.json"
        run_here("sft", f"{TINY_RUN} {ALL_AT_ONCE} --tokenizer {TOY}", demonstrations,
                 f"--steps 40 --lr 0.02 --out {root}/sft")
        run_here("sft", f"{ALL_AT_ONCE} --model {root}/sft", demonstrations, f"--steps 3 --out {root}/other")
        run_here("reward", f"{ALL_AT_ONCE} --model {root}/sft --data {root}/rankings.json",
                 f"--steps 2 --out {root}/reward")
    return root


@pytest.fixture
def flags(chain):
    """Flags of each trainer for runs in this process, on the chain's files."""
    root = chain[0]
    preferences = f"--data {root}/preferences/train.jsonl --val-data {root}/preferences/heldout.jsonl"
    files = f"{preferences} --model {root}/sft"
    steps = f"--data {TOY}/steps.jsonl --val-data {TOY}/steps_heldout.jsonl --model {root}/sft"
    sampling = f"--model {root}/sft --reward {root}/reward --data {TOY}/prompts.jsonl"
    inputs = {"sft": f"{TINY_RUN} {DEMONSTRATIONS}", "reward": files, "dpo": files, "kto": files,
              "process": steps, "ppo": sampling, "grpo": sampling}
    return {name: f"{inputs[name]} {QUICK[name]} --threads 1 --steps 4" for name in TRAINERS}


# -- judges of a user, and somebody who chats

@pytest.fixture
def judged(small, tmp_path, monkeypatch):
    """Evaluate three models by functions, on questions with answers: judged(flags) -> (results, replies)."""
    (tmp_path / "mine.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [{"question": f"Say {word}.", "answer": f"So it is.\n#### {i}"} for i, word in enumerate(WORDS)]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    for name in ("a", "b"):
        shutil.copytree(small / "sft", tmp_path / name / "sft")

    def evaluation(flags):
        models = f"{tmp_path}/a/sft {tmp_path}/b/sft {small}/other"
        run_here("evaluate", f"--models {models} --data {tmp_path}/questions.json --max-new-tokens 8",
                 f"--out {tmp_path}/results.json {flags}")
        found = json.loads((tmp_path / "results.json").read_text())
        return found["results"], found["replies"]

    return evaluation


@pytest.fixture
def talk(monkeypatch):
    """Ask three questions: talk(flags) -> how many messages chat.py's model was given each time."""
    def talk(flags):
        lengths, lines = [], iter(["What is 1 + 2?", "What is 2 + 2?", "What is 3 + 3?"])

        def counted(tokenizer, messages):
            lengths.append(len(messages))
            return encode_prompt(tokenizer, messages)

        monkeypatch.setattr(chat, "encode_prompt", counted)
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
        run_here("chat", "--max-new-tokens 4", flags)
        return lengths

    return talk


# -- small inputs, and the libraries that they are compared with

@pytest.fixture
def tokenizer():
    return Tokenizer("bytes", r"\s+|\S+", {bytes([b]): b for b in range(256)})


@pytest.fixture
def batch():
    """ids and mask (4, 12), right-padded: a plain response, a single token, two stretches, an empty mask."""
    ids = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, 3:9] = mask[1, 1] = mask[2, 2:4] = mask[2, 7:12] = True
    ids[torch.arange(12) >= BATCH_LENGTHS[:, None]] = 257
    return ids, mask


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="the peer that token ids are compared with")


@pytest.fixture(scope="session")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="what opens other projects' tokenizers")
