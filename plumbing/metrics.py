"""metrics.jsonl: a row of numbers per logged step. TensorBoard and Weights & Biases get the same rows, if asked for."""
import dataclasses
import importlib
import json
from pathlib import Path

from plumbing.disk import write_atomically
from plumbing.flags import UserError


def check_boards(config):
    """UserError if a package that --tensorboard or --wandb needs is not there."""
    try:
        if config.tensorboard:
            importlib.import_module("torch.utils.tensorboard")
        if config.wandb:
            importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(f"{error}; install it, or leave out --tensorboard and --wandb") from None


def open_boards(config):
    """[f(step, row)] for --tensorboard and --wandb."""
    boards = []
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(config.out)
        boards.append(lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()])
    if config.wandb:
        import wandb
        run = wandb.init(project=config.wandb, config=dataclasses.asdict(config), dir=config.out)
        boards.append(lambda step, row: run.log(row, step=step))
    return boards


class Metrics:
    """The metrics of a run, opened to append. finished: the run is complete, so that nothing will be computed again."""

    def __init__(self, config, step, finished):
        self.path, self.unwritten, self.warned, self.boards = Path(config.out) / "metrics.jsonl", b"", False, open_boards(config)
        lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")] if self.path.exists() else []

        def keep(line):  # a killed run may have logged rows after its last checkpoint; and what followed that first was an evaluation
            row = json.loads(line)
            return row["step"] < step or (row["step"] == step and (finished or not any(name.startswith("val_") for name in row)))

        write_atomically(self.path, "".join(line + "\n" for line in lines if keep(line)).encode())
        self.file = open(self.path, "ab", buffering=0)

    def write(self, row, say):
        """Append a row."""
        self.unwritten += (json.dumps(row) + "\n").encode()
        self.flush(say)
        for board in self.boards:
            board(row["step"], row)

    def flush(self, say):
        """Write the rows that wait in memory, as they do while the disk is full."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten):]
            self.warned = False
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} can't be written ({error.strerror}); its rows wait in memory until it can")
            self.warned = True
