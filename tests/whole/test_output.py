"""What scripts print, on consoles that lack letters and to readers that leave."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

import tools
from tools import DATA, DEMONSTRATIONS, ROOT, TINY_RUN, TOY, WORDS, command


@pytest.mark.case(36)
@pytest.mark.parametrize("encoding", ["gbk", pytest.param("ascii", marks=pytest.mark.long)])
def test_no_letter_that_a_console_lacks_ends_a_script(encoding, small, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    reply = "Stra\u00dfe, \u010desk\u00fd, \u4e2d"
    rows = [{"instruction": f"Sag {word}. \U0001f600", "output": reply} for word in WORDS]
    data = tmp_path / "r\u00f6ws.json"
    data.write_text(json.dumps(rows))
    train = f"{TINY_RUN} --tokenizer {TOY} --val-fraction 0.3 --steps 1 --out {tmp_path}/run"
    commands = [("sft", 0, f"{train} --data {data}"), ("chat", 0, f"--model {small}/sft --max-new-tokens 4"),
                ("evaluate", 0, f"--models {small}/sft --data {data} --reward {small}/reward"),
                ("sft", 2, f"--data n\u00f6where.json --tokenizer {TOY}")]
    for script, code, flags in commands:
        done = command(script, flags, input="Wo ist die Stra\u00dfe?\n", errors="replace")
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def unheard(script, *flags, at_once, error=subprocess.PIPE, **options):
    """Run a script whose output nobody reads, as behind `| head` once that has its lines.

    at_once: it notices at the first line, not when a buffer is full.
    """
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, str(ROOT / f"{script}.py"), *shlex.split(" ".join(flags))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PYTHONUNBUFFERED"] = "1" if at_once else ""
    with os.fdopen(write, "wb") as output:
        return subprocess.run(words, stdout=output, stderr=error, env=environment, text=True, timeout=240,
                              **options)


@pytest.mark.case(36)
@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_script_whose_output_nobody_reads_ends_quietly_and_writes_whole_files(at_once, chain, tmp_path):
    root = shutil.copytree(chain[0], tmp_path / "demo")
    before = (root / "report.html").read_bytes()
    (root / "report.html").unlink(), (root / "summary.json").unlink()
    runs = [
        ("sft", "--help"),
        ("report", f"--demo {root} --seconds 12"),
        ("evaluate",
         f"--models {root}/sft --data {DATA['evaluate']} --judge toy:gold --out {tmp_path}/evaluation.json "
         f"--prompts 4"
         ),
        ("toy", f"--model {root}/sft --out {tmp_path}/toy --groups 20 --heldout-groups 4 --samples 1"),
        ("sft", f"{TINY_RUN} {DEMONSTRATIONS} --steps 2 --out {tmp_path}/run"),
    ]
    for script, flags in runs:
        done = unheard(script, flags, at_once=at_once)
        expected = 128 + signal.SIGPIPE if at_once and script != "sft" else 0
        assert (done.returncode, done.stderr) == (expected, ""), script
    assert (root / "report.html").read_bytes() == before and json.loads((root / "summary.json").read_text())
    assert json.loads((tmp_path / "evaluation.json").read_text())["results"]
    files = {path.name: path.read_bytes()[-2:] for path in (tmp_path / "toy").iterdir()}
    assert files in ({}, {"train.jsonl": b"}\n", "heldout.jsonl": b"}\n"})
    assert tools.latest(tmp_path / "run").name == "step_000002"


@pytest.mark.parametrize("at_once", [False, True])
def test_a_script_that_is_cut_short_by_its_reader_ends_as_sigpipe_ends_others(at_once, chain):
    talk = f"--model {chain[0]}/sft --max-new-tokens 4"
    done = unheard("chat", talk, at_once=at_once, input="Hello.\n" * 3)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
    wrong = unheard("sft", f"--data nowhere.json --tokenizer {TOY}", at_once=at_once, error=subprocess.STDOUT)
    assert wrong.returncode == 2
