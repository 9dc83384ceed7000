"""plumbing/metrics.py: a line of the log against the rows that it is of."""
import re

from plumbing import run as runtime
from tools import DEMONSTRATIONS, TINY_RUN, rows_of, run_here


def test_a_line_of_the_log_has_no_old_value_beside_a_new_step(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 100))  # so late each time that every step has its line
    monkeypatch.setattr(runtime.time, "time", clock.__next__)
    run_here("sft", TINY_RUN, DEMONSTRATIONS,
             f"--batch-tokens 512 --eval-every 2 --steps 5 --log-every 2 --out {tmp_path}/run")
    measured = {row["step"]: row for row in reversed(rows_of(tmp_path / "run")) if "val_loss" in row}
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d/5 ", line)]
    assert len(lines) == 6 + 1
    for line in lines:
        step, (value, _, old) = int(line[5]), re.search(r"val_loss ([\d.]+)( \(step (\d)\))?", line).groups()
        assert old is None or int(old) < step
        assert value == f"{measured[int(old or step)]['val_loss']:.4g}"
    assert any("(step " in line for line in lines) and "(step " not in lines[-1].split("loss")[1]
