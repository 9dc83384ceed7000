"""report.py: a page that is made again, and the commands that it says to try next."""
import itertools
import json
import re
import shutil
from pathlib import Path

import report
from tools import readme_commands, run_here


def test_a_report_made_again_keeps_the_time_and_a_demos_curves_are_another_picture(chain, tmp_path, capsys):
    root = shutil.copytree(chain[0], tmp_path / "demo")

    def seconds(flags=""):
        run_here("report", f"--demo {root} {flags}")
        found = json.loads((root / "summary.json").read_text())["seconds.total"]
        assert f"Total wall time: {found:.0f} s" in (root / "report.html").read_text()
        return found

    assert [seconds(), seconds("--seconds 30"), seconds()] == [12, 30, 30]
    before = (root / "curves.png").read_bytes()
    run_here("report", f"--curves {root}")
    assert (root / "curves.png").read_bytes() == before and (root / "stages.png").stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[-1] == f"{root}/stages.png"
    (root / "summary.json").unlink()
    run_here("report", f"--curves {root}")
    assert (root / "curves.png").read_bytes() == (root / "stages.png").read_bytes()


def test_what_the_report_says_to_try_next_and_the_readme_write_to_different_folders():
    def folders(lines):
        return {found for line in lines for found in re.findall(r"--out (\S+)", line)}

    suggested, known = folders(line for _, line in report.TRY_NEXT), folders(readme_commands())
    assert len(suggested) == 4 and len(known) > 10
    for ours, other in itertools.product(map(Path, suggested), map(Path, known)):
        assert ours not in (other, *other.parents) and other not in ours.parents, ours
