"""metrics.jsonl: a row of numbers per logged step. TensorBoard and Weights & Biases get them if asked for."""
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

        def to_tensorboard(step, row):
            for name, value in row.items():
                writer.add_scalar(name, value, step)

        boards.append(to_tensorboard)
    if config.wandb:
        import wandb
        run = wandb.init(project=config.wandb, config=dataclasses.asdict(config), dir=config.out)

        def to_wandb(step, row):
            run.log(row, step=step)

        boards.append(to_wandb)
    return boards


def is_evaluation(row):
    """Whether a row of metrics was measured on held-out data."""
    return any(name.startswith("val_") for name in row)


class Metrics:
    """The metrics of a run, opened to append.

    step: how many steps are done. finished: the run is complete, so that nothing will be computed again.
    """

    def __init__(self, config, step, finished):
        self.path = Path(config.out) / "metrics.jsonl"
        self.unwritten = b""
        self.warned = False
        self.boards = open_boards(config)

        # A killed run may have logged rows after its last checkpoint. They will be computed again, and so
        # will the evaluation that followed the checkpoint at once.
        kept = []
        for line in self._whole_lines():
            row = json.loads(line)
            at_checkpoint = row["step"] == step and (finished or not is_evaluation(row))
            if row["step"] < step or at_checkpoint:
                kept.append(line + "\n")
        write_atomically(self.path, "".join(kept).encode())
        self.file = open(self.path, "ab", buffering=0)

    def _whole_lines(self):
        """The lines of the file, but for one that was cut off in the middle."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines() if line.endswith("}")]

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
                written = self.file.write(self.unwritten)
                self.unwritten = self.unwritten[written:]
            self.warned = False
        except OSError as error:
            if not self.warned:
                say(f"warning: {self.path} can't be written ({error.strerror}); "
                    "its rows wait in memory until it can")
            self.warned = True
