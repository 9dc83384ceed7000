"""Work that is done in parts, each of which is kept, so that --resume goes on behind the last one."""
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from plumbing.disk import folder_of, write_atomically, write_json
from plumbing.flags import require
from plumbing.run import changed_settings, read_state


class Parts:
    """What a script that samples keeps in --out: run.json, a file for each part, and in the end what is made
    of all of them.

    Attributes: done, whether it has come to its end before.
    """

    def __init__(self, config, inputs):
        """UserError if --out can't be used as the flags say. Changes nothing.

        inputs: {flag: [{file: SHA-256}, ...]}.
        """
        self.out = Path(config.out)
        self.settings = {"config": asdict(config), "inputs_sha256": inputs}
        self.done = (self.out / "summary.json").exists()
        require(not self.out.is_file(), f"--out {self.out} is a file; name a folder")
        path = self.out / "run.json"
        if path.exists():
            require(config.resume, f"--out {self.out} already holds records: add --resume, or name another")
            changed = changed_settings(config, inputs, read_state(path))
            require(not changed, f"--resume: since {self.out} was begun, {'; '.join(changed.values())}; "
                                 "name another --out")

    def get(self, number, make):
        """What make() returns for a part, a JSON value: made now, or when the part was first asked for."""
        path = self.out / "parts" / f"{number:06d}.json"
        if path.exists():
            return json.loads(path.read_bytes())
        folder_of(path)
        write_json(self.out / "run.json", self.settings)
        value = make()
        write_json(path, value)
        return value

    def finish(self, files, summary):
        """Write {name: rows} as JSON Lines and summary.json, which comes last: where it is, all are."""
        for name, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(self.out / f"{name}.jsonl", text.encode())
        write_json(self.out / "summary.json", summary)
        shutil.rmtree(self.out / "parts", ignore_errors=True)
