"""Two machines, each with a torchrun of its own, of which one dies. The documentation's Slurm script."""
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tools

pytestmark = [pytest.mark.case(35), pytest.mark.long]

RUN = "--steps 40 --save-every 8 --micro-batch-tokens 200"


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def machines(root, out, port, *flags):
    """Start the run on two machines as docs/cluster.md has it, except that both are this one."""
    launcher = shlex.split(f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 "
                           f"--rdzv-id 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
                           "--local-addr 127.0.0.1")
    words = (RUN, f"--out {out} --rank-timeout 20", *flags)
    return [tools.start("sft", root, *words, launcher=launcher) for _ in range(2)]


def family(pid):
    """A process and all that it has started, whatever groups they are in."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def pull_the_plug(pid):
    for member in family(pid):
        os.kill(member, signal.SIGKILL)


def logged(out):
    """How many rows of metrics a run has."""
    return len(tools.metrics(out)) if (out / "metrics.jsonl").exists() else 0


def end_of(process, seconds=120):
    """Exit code and output of a machine, once it has ended."""
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


@pytest.fixture(scope="module")
def unbroken_pair(root):
    """The run as two ranks of one machine make it."""
    tools.run("sft", root, RUN, f"--out {root}/pair", launcher=tools.TORCHRUN)
    return root / "pair"


@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_machines_dies_and_both_come_back_as_if_it_had_not(lost, root, unbroken_pair, tmp_path):
    """One of them keeps what they meet at, so either is lost once."""
    out, port = tmp_path / "run", free_port()
    pair = machines(root, out, port, "--resume")
    try:
        tools.wait_for(lambda: logged(out) > 12, pair[0])
        began = time.monotonic()
        pull_the_plug(pair[lost].pid)
        code, said = end_of(pair[1 - lost])
        assert code == 1 and time.monotonic() - began < 60, said
        assert "has lost the others in step" in said
        end_of(pair[lost])
        step = int(tools.latest(out).name.removeprefix("step_"))
        assert step in (8, 16, 24, 32)
        pair = machines(root, out, port, "--resume")
        ends = [end_of(machine) for machine in pair]
        assert [code for code, _ in ends] == [0, 0], ends
        assert any(f"resumed {out} after step {step}" in said for _, said in ends)
    finally:
        for machine in pair:
            if machine.poll() is None:
                pull_the_plug(machine.pid)
    assert tools.same(out, unbroken_pair)


# -- the Slurm script

# What Slurm has: a job's hosts and its place in the queue, and a command on each of its machines.
STUBS = {
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>"$STUBS/requeued"; fi',
    "srun": 'rm -f "$STUBS/pids"\nfor node in 1 2; do "$@" & echo $! >>"$STUBS/pids"; done\nwait',
    "torchrun": 'exec "$PYTHON" -m torch.distributed.run --local-addr 127.0.0.1 "$@"'}


def slurm_script(out, command):
    """The script of docs/cluster.md with another output folder and command, and one process per machine."""
    text = (tools.ROOT / "docs" / "cluster.md").read_text()
    script, = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)
    trained, = re.findall(r"ppo\.py .*?(?= --resume)", script)
    changes = {trained: command, "out=/shared/runs/ppo": f"out={out}",
               "--nproc-per-node 8": "--nproc-per-node 1", ":29500": f":{free_port()}"}
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.fixture
def job(root, tmp_path):
    """f(flags) starts a job on two machines. f.machines(): its torchruns; f.requeued(): what put it back."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    environment = tools.ENVIRONMENT | {
        "PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs), "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    queue = stubs / "requeued"

    def start(*flags):
        command = " ".join([str(tools.ROOT / "sft.py"), *tools.words("sft", root, *flags)])
        script = slurm_script(tmp_path / "run", command)
        return subprocess.Popen(["bash", "-c", script], env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, start_new_session=True)

    start.requeued = lambda: queue.read_text().splitlines() if queue.exists() else []
    start.machines = lambda: [int(pid) for pid in (stubs / "pids").read_text().split()]
    return start


def test_slurm_puts_a_job_back_that_was_stopped_and_none_that_has_finished(job, unbroken_pair, tmp_path):
    out = tmp_path / "run"
    process = job(RUN)
    tools.wait_for(lambda: logged(out) > 4, process)
    for pid in job.machines():
        os.kill(pid, signal.SIGTERM)
    code, said = end_of(process)
    assert re.search(r"stopped after step \d+ of 40", said) and job.requeued() == ["requeue 7"], said
    code, said = end_of(job(RUN))
    assert code == 0, said
    assert "resumed" in said and json.loads((out / "run.json").read_text())["finished_after"] == 40
    assert job.requeued() == ["requeue 7"] and tools.same(out, unbroken_pair)


def test_slurm_puts_a_job_back_whose_machine_died_after_a_checkpoint(job, tmp_path):
    process = job(RUN)
    tools.wait_for(lambda: (tmp_path / "run" / "checkpoints" / "latest.json").exists(), process)
    pull_the_plug(job.machines()[1])
    end_of(process)
    assert job.requeued() == ["requeue 7"]


@pytest.mark.parametrize("what", ["a wrong flag", "a machine dies before the first checkpoint"])
def test_slurm_does_not_put_a_job_back_that_got_nowhere(what, job, tmp_path):
    if what == "a wrong flag":
        code, said = end_of(job(RUN, "--warmup -1"))
        assert "error: --warmup must be >= 0" in said
    else:
        process = job("--steps 200")
        tools.wait_for(lambda: logged(tmp_path / "run") > 4, process)
        pull_the_plug(job.machines()[0])
        end_of(process)
    assert job.requeued() == []
