"""Does the test suite notice? Small bugs, put one at a time into a copy of the repository.

A mutant is one replacement in one file, of a kind that RLHF code has had. It is killed when a test fails that
passes without it: the test that it names, or else any of the whole suite. Two are tried at a time, each in a
copy of its own; the repository itself is never touched. The tables beside this file, one for each source file
under its own path, hold the mutants: MUTANTS = [(name, test, old, new), ...].

    python tests/mutants            all of them: about 40 minutes on 2 busy cores
    python tests/mutants NAME...    those with these names, or with these words in them
    python tests/mutants --list     their names; like every run, exit code 1 if a replacement no longer fits
"""
import sys
from pathlib import Path

# This folder is where Python looks for modules first, and its tables are called like the project's files.
HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]

import argparse  # noqa: E402
import os  # noqa: E402
import queue  # noqa: E402
import re  # noqa: E402
import runpy  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from concurrent.futures import ThreadPoolExecutor, as_completed  # noqa: E402
from typing import NamedTuple  # noqa: E402

from tqdm import tqdm  # noqa: E402

ROOT = HERE.parent.parent
# The tests need these and the folders that are packages.
COPIED = ("*.py", "*.md", "*.sh", "*.txt", "LICENSE", "bench", "docs", "recipes", "tests")
LIMIT, SUITE_LIMIT = 300, 1200  # seconds, after which a mutant hangs


class Mutant(NamedTuple):
    name: str
    file: str
    test: str  # that ought to kill it: a file of tests/, or one test in it
    old: str  # occurs once in the file
    new: str


def read_tables():
    """All mutants, in the order of their files' paths."""
    found = []
    for table in sorted(HERE.rglob("*.py")):
        if table != HERE / "__main__.py":
            file = table.relative_to(HERE).as_posix()
            rows = runpy.run_path(str(table))["MUTANTS"]
            found += [Mutant(name, file, test, old, new) for name, test, old, new in rows]
    return found


MUTANTS = read_tables()
lock, running, stopping = threading.Lock(), set(), threading.Event()


def misfits():
    """What is wrong with the tables.

    A replacement that doesn't fit its file or leaves no Python, a name that comes twice, a test that is gone.
    """
    names = [m.name for m in MUTANTS]
    for m in MUTANTS:
        if not (ROOT / m.file).is_file():
            yield f"{m.name}: there is no {m.file}"
            continue
        source = (ROOT / m.file).read_text("utf-8")
        file, _, test = m.test.partition("::")
        tests = ROOT / "tests" / file
        if not tests.is_file() or test and f"\ndef {test.split('[')[0]}(" not in tests.read_text("utf-8"):
            yield f"{m.name}: there is no {m.test}"
        if source.count(m.old) != 1:
            yield f"{m.name}: its text occurs {source.count(m.old)} times in {m.file}, not once: {m.old!r}"
        elif names.count(m.name) > 1:
            yield f"{m.name}: the name of two"
        else:
            compile(source.replace(m.old, m.new), f"{m.file} with '{m.name}'", "exec")


def copy_repository(folder):
    """A copy of what the tests need in folder/repository, and a folder for temporary files beside it."""
    (folder / "repository").mkdir(parents=True)
    (folder / "tmp").mkdir()
    rooms = {file.parent for file in ROOT.glob("*/__init__.py")}
    for path in sorted(rooms | {path for pattern in COPIED for path in ROOT.glob(pattern)}):
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / "repository" / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder / "repository")


def end(process):
    """End a pytest and what it started; gently at first, so that a torchrun takes its workers along."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            for _ in range(50):
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def pytest(folder, tests, limit):
    """Run tests of a copy up to the first that fails.

    Returns (exit code, that test, output); code None: ran past the limit.
    """
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    words += [f"--basetemp={folder}/tmp/pytest"]
    words += [f"tests/{test}" for test in tests]
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TMPDIR": f"{folder}/tmp",
        "COLUMNS": "200",
        # Of a file that changes twice in a second the bytecode of the first would be used.
        "PYTHONDONTWRITEBYTECODE": "1"
    }
    with open(folder / "output", "w+", encoding="utf-8", errors="replace") as output:
        with lock:
            if stopping.is_set():
                raise KeyboardInterrupt
            process = subprocess.Popen(words,
                                       cwd=folder / "repository",
                                       env=environment,
                                       stdout=output,
                                       stderr=output,
                                       start_new_session=True)
            running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            end(process)
            code = None
        running.discard(process)
        output.seek(0)
        text = output.read()
    found = re.search(r"^(?:FAILED|ERROR) tests/(.+?::.+?)(?: - .*)?$", text, re.M)
    return code, found[1] if found else None, text


def check(tests, copies):
    """None if tests pass without a mutant, else pytest's output."""
    folder = copies.get()
    try:
        code, _, text = pytest(folder, tests, SUITE_LIMIT)
    finally:
        copies.put(folder)
    return None if code == 0 else text


def attempt(m, copies):
    """(killed, by which test or why not, seconds) of a mutant."""
    folder, began = copies.get(), time.time()
    file = folder / "repository" / m.file
    source = file.read_text("utf-8")
    try:
        file.write_text(source.replace(m.old, m.new), "utf-8")
        code, by, text = pytest(folder, [m.test], LIMIT)
        named = code != 0
        if not named:
            code, by, text = pytest(folder, [""], SUITE_LIMIT)
        killed = code in (1, None)
        if code == 0:
            by = "survived the whole suite"
        elif code is None:
            by = "hangs"
        # Nothing failed, nothing could be run: the mutant is not what it is meant to be.
        elif code != 1 or by is None:
            killed, by = False, f"pytest ended with exit code {code}:\n{text[-2000:]}"
        elif not named:  # this test has not been seen to pass without the mutant
            file.write_text(source, "utf-8")
            killed = pytest(folder, [by], SUITE_LIMIT)[0] == 0
            by += " (it names another)" if killed else " fails without it too"
    finally:
        file.write_text(source, "utf-8")
        copies.put(folder)
    return killed, by, time.time() - began


def run(mutants):
    """Exit code: 0 if every mutant is killed."""
    began, survivors = time.time(), []
    with tempfile.TemporaryDirectory(prefix="mutants-") as top, ThreadPoolExecutor(2) as pool:
        try:
            copies = queue.Queue()
            for name in ("a", "b"):
                copy_repository(Path(top, name))
                copies.put(Path(top, name))
            tests = {}  # of each file, those named
            for m in mutants:
                tests.setdefault(m.test.split("::")[0], {})[m.test] = None
            for job in as_completed([pool.submit(check, named, copies) for named in tests.values()]):
                if job.result() is not None:
                    why = "without a mutant a test fails: that it fails with one would mean nothing"
                    raise SystemExit(f"{job.result()}\n{why}")
            seconds = time.time() - began
            print(f"without a mutant, the tests that are to kill them pass ({seconds:.0f} s)", flush=True)
            jobs = {pool.submit(attempt, m, copies): m for m in mutants}
            for job in tqdm(as_completed(jobs), total=len(jobs), leave=False, disable=None):
                m, (killed, by, seconds) = jobs[job], job.result()
                survivors += [] if killed else [m]
                fate = "killed" if killed else "SURVIVED"
                tqdm.write(f"{fate} | {m.name} | {m.file} | {by} | {seconds:.1f} s")
                sys.stdout.flush()
        except BaseException:  # Ctrl-C too
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            with lock:
                for process in list(running):
                    end(process)
            raise
    for m in survivors:
        print(f"survivor: {m.name} ({m.file})")
    killed, minutes = len(mutants) - len(survivors), (time.time() - began) / 60
    print(f"killed {killed} of {len(mutants)} ({minutes:.1f} minutes)")
    return 1 if survivors else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant's name, or a part of several")
    parser.add_argument("--list", action="store_true", help="list them")
    args = parser.parse_args()
    problems = list(misfits())
    problems += [
        f"{name}: no such mutant; --list shows their names" for name in args.names
        if not any(name in m.name for m in MUTANTS)
    ]
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if args.list:
        print("\n".join(f"{m.file:32} {m.name}" for m in chosen))
    if problems:
        sys.exit("\n".join(problems))
    if not args.list:
        # Cleans up as after Ctrl-C.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            sys.exit(run(chosen))
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
