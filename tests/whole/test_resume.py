"""A run that is interrupted and resumed ends in the same bits, and notices when what it read has changed."""
import datetime
import json
import shlex
import shutil
import signal

import pytest

import model
import sft
import tools
from formats.model_folder import load_model
from plumbing.flags import UserError
from tools import (
    ALL_AT_ONCE, TINY_RUN, TOY, TRAINERS, WORDS, recorded, rows_of, run_here, stopped_in_the_second_step)


# -- interrupted and damaged

@pytest.mark.parametrize("name", TRAINERS)
def test_resume_after_an_interrupt_equals_never_stopping_bit_for_bit(name, flags, tmp_path):
    run_here(name, flags[name], f"--out {tmp_path}/whole")
    with stopped_in_the_second_step():
        run_here(name, flags[name], f"--out {tmp_path}/parts")
    assert tools.latest(tmp_path / "parts").name == "step_000002"
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as f:
        f.write('{"step": 3, "loss": 9.9}\n{"step": 4, "lo')  # what a kill leaves behind
    run_here(name, flags[name], f"--out {tmp_path}/parts --resume")
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert tools.same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.case(26)
def test_ctrl_c_saves_and_resume_goes_on_with_the_same_settings_alone(tmp_path):
    words = f"--steps 100000 --out {tmp_path}/run"
    process = tools.start("sft", tmp_path, words)
    tools.wait_for(
        lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(rows_of(tmp_path / "run")) > 3, process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in said and "Traceback" not in said
    assert tools.latest(
        tmp_path
        / "run").name == f"step_{max(row['step'] for row in rows_of(tmp_path / 'run') if 'loss' in row):06d}"
    load_model(tmp_path / "run", model.GPT)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for change, said in (("--lr 0.1", "lr was 0.005, is now 0.1"), ("--heads 1", "heads was 2, is now 1"),
                         ("--layers 2", "layers was 1, is now 2"),
                         ("--lr 0.1 --heads 1 --override", "has another model: --heads was 2, is now 1;")):
        with pytest.raises(UserError, match=said):
            # Else whoever forgets to refuse trains for hours.
            run_here("sft", *tools.words("sft", tmp_path, words, "--resume", change, "--steps 1"))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


@pytest.mark.case(7)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_is_refused_if_there_is_none(
        flags, tmp_path, capsys):
    words = f"{flags['sft']} --save-every 1"
    run_here("sft", words, f"--out {tmp_path}/whole")
    run_here("sft", words, f"--out {tmp_path}/run")

    def cut(checkpoint):
        path = tmp_path / "run" / "checkpoints" / checkpoint / "training.safetensors"
        path.write_bytes(path.read_bytes()[:1000])

    cut("step_000004")
    capsys.readouterr()
    run_here("sft", words, f"--out {tmp_path}/run --resume")
    said = capsys.readouterr().out
    assert "step_000004 is damaged (training.safetensors has 1,000 bytes, should have " in said
    assert "/run after step 3" in said
    assert tools.same(tmp_path / "run", tmp_path / "whole")
    for folder in (tmp_path / "run" / "checkpoints").glob("step_*"):
        cut(folder.name)
    with pytest.raises(UserError, match="no checkpoint in .* is whole"):
        run_here("sft", words, f"--out {tmp_path}/run --resume")


# -- data and models that are not what they were

@pytest.mark.case(26)
def test_resume_refuses_inputs_that_have_changed_since(flags, tmp_path):
    rows = [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    inputs = f"{TINY_RUN} --tokenizer {TOY} --data {tmp_path}/rows.json"
    words = f"{inputs} --val-fraction 0 --steps 2 --out {tmp_path}/run"
    run_here("sft", words)
    (tmp_path / "rows.json").write_text(json.dumps(rows[:3]))
    with pytest.raises(UserError,
                       match="since the run in .* began, what --data names has changed; .* --override"):
        run_here("sft", words, "--resume")
    run_here("sft", words, "--resume --override")


ROWS = [{"prompt": f"Say {word}.", "chosen": "Yes.", "rejected": "No."} for word in WORDS]


@pytest.mark.case(26)
@pytest.mark.parametrize("spec", ["{a}", "{a},{b}", " {a} , {b}", "{a}:0.5,{b}:0.5", "{a}:5e-1, {b}:+.5",
                                  "{b}:1,{a}:1"])
def test_resume_notices_a_file_that_has_changed_however_it_is_named(spec, tmp_path):
    for name, rows in (("a", ROWS[:3]), ("b", ROWS[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    spec = spec.format(a=tmp_path / "a.json", b=tmp_path / "b.json")
    flags = [f"{TINY_RUN} --tokenizer {TOY} --val-fraction 0 --steps 1 --out {tmp_path}/run",
             f"--data {shlex.quote(spec)}"]
    run_here("sft", *flags)
    run_here("sft", *flags, "--resume")
    (tmp_path / "a.json").write_text(json.dumps([*ROWS[:2], ROWS[2] | {"chosen": "Of course."}]))
    with pytest.raises(UserError, match="what --data names has changed"):
        run_here("sft", *flags, "--resume")


@pytest.mark.case(26)
def test_resume_notices_any_change_of_what_a_model_folder_is_opened_from_and_of_nothing_else(small, tmp_path):
    folder = shutil.copytree(small / "sft", tmp_path / "model")
    data = small / "demonstrations.json"
    flags = f"{ALL_AT_ONCE} --model {folder} --data {data} --steps 1 --out {tmp_path}/run"
    run_here("sft", flags)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes((before or b"{}") + b"\n")
        with pytest.raises(UserError, match="what --model names has changed"):
            run_here("sft", flags, "--resume")
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    (folder / "metrics.jsonl").unlink(), (folder / "notes.txt").write_text("mine")
    run_here("sft", flags, "--resume")


@pytest.mark.case(26)
def test_resume_notices_a_changed_folder_of_a_tokenizer(small, tmp_path):
    folder = shutil.copytree(small / "sft", tmp_path / "tokenizer")
    inputs = f"{TINY_RUN} --tokenizer {folder} --data {small}/demonstrations.json"
    flags = f"{inputs} --steps 1 --out {tmp_path}/run"
    run_here("sft", flags)
    run_here("sft", flags, "--resume")
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b"\n")
    with pytest.raises(UserError, match="what --tokenizer names has changed"):
        run_here("sft", flags, "--resume")


DATED = ("{{ strftime_now('%d %B') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
         "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.mark.case(26)
@pytest.mark.parametrize("lost", ["nothing", "run.json"])
def test_a_run_resumed_another_day_writes_the_date_of_its_beginning(lost, small, tmp_path, monkeypatch):
    pytest.importorskip("tokenizers"), pytest.importorskip("jinja2")
    folder = shutil.copytree(small / "sft", tmp_path / "model")
    library = json.loads((folder / "tokenizer.json").read_text())
    library["model"]["ignore_merges"] = False  # so it is not our own tokenizer, which has our own template
    (folder / "tokenizer.json").write_text(json.dumps(library))
    (folder / "chat_template.jinja").write_text(DATED)
    seen = recorded(monkeypatch, sft, "encode_demonstrations")["encode_demonstrations"]

    def run_on(day, *flags):
        class Calendar(datetime.datetime):
            @classmethod
            def now(cls):
                return cls(2026, 1, day)

        monkeypatch.setattr(datetime, "datetime", Calendar)
        run_here("sft", f"{ALL_AT_ONCE} --model {folder} --data {small}/demonstrations.json",
                 f"--out {tmp_path}/run", *flags)
        tokenizer = load_model(folder, model.GPT)[1]
        return seen[-1][1], tokenizer.decode(seen[-1][1][0][0])

    with stopped_in_the_second_step():
        run_on(30, "--steps 4")
    (tmp_path / "run" / lost).unlink(missing_ok=True)
    before = seen[-1][1]
    after, text = run_on(31, "--steps 4 --resume")
    assert before == after and text.startswith("30 January")
    assert run_on(31, "--steps 4 --overwrite")[1].startswith("31 January")
