import json
import os

import pytest

import tools
import toy


@pytest.fixture(autouse=True)
def disk_that_keeps_nobody_waiting(monkeypatch):
    """For runs in this process: fsync matters to power cuts alone."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with a tiny SFT model, a reward model and preferences, which PLAN's runs start from."""
    root = tmp_path_factory.mktemp("faults")
    rows = [{"prompt": row.prompt, "completions": row.replies, "ranks": row.ranks}
            for row in toy.World(0).preferences("train", 300)]
    (root / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tools.here("sft", root, f"--out {root}/sft --steps 2")
    tools.here("reward", root, f"--out {root}/reward --steps 2")
    return root


class Unbroken(dict):
    """{script: folder of its run with tools.SHORT, in which nothing happened}, made when first asked for."""

    def __init__(self, root):
        self.root = root

    def __missing__(self, script):
        self[script] = self.root / f"unbroken-{script}"
        assert tools.here(script, self.root, tools.SHORT, f"--out {self[script]}") == 0
        return self[script]


@pytest.fixture(scope="session")
def unbroken(root):
    return Unbroken(root)
