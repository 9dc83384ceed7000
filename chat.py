"""Talk to a checkpoint in the terminal; with --compare, to several at once.

    python chat.py --model runs/demo/ppo
    python chat.py --compare runs/demo/sft runs/demo/ppo
    echo "What is the capital of France?" | python chat.py --model runs/demo/ppo

A line is your turn. /new forgets the conversation, /quit or Ctrl-D ends. Each model keeps its own
conversation. One that has only ever been trained on single questions, as the demo's have, answers each
by itself.
"""
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from formats.families import knows_single_turns
from formats.model_folder import load_model
from judges import short_names
from model import GPT
from generate import generate
from plumbing.flags import Count, Natural, NonNegative, Seed, UserError, require
from plumbing.hardware import autocast, pick_device, pick_dtype
from plumbing.run import run_script
from data import encode_prompt


@dataclass
class Config:
    model: str = "runs/demo/ppo"  # checkpoint folder
    compare: list[str] = field(default_factory=list)  # checkpoint folders that all answer, instead of --model
    history: Literal["auto", "keep", "forget"] = "auto"  # earlier turns; auto: if the model knows any
    system: str = ""  # system message at the head of the conversation
    temperature: NonNegative = 0.7  # of sampling; 0 takes the likeliest token
    top_k: Natural = 0  # sample among this many likeliest tokens, 0 for all
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0  # sample among the fewest tokens with this much probability
    max_new_tokens: Count = 64  # longest reply, tokens
    seed: Seed = 0  # seed of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    allow_pickle: bool = False  # also open pickled weights, which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


class Talker:
    """One of the models, and the conversation with it."""

    def __init__(self, name, folder, config, device):
        self.name = name
        self.model, self.tokenizer = load_model(folder, GPT, allow_pickle=config.allow_pickle)
        self.model.to(device).eval()
        context = self.model.config.block_size
        require(config.max_new_tokens < context,
                f"--max-new-tokens {config.max_new_tokens} fills the context of {context}")
        self.forgets = config.history == "forget"
        if config.history == "auto" and knows_single_turns(self.model.config):
            self.forgets = True
        self.opening = []
        if config.system:
            self.opening.append({"role": "system", "content": config.system})
        self.begin()

    def begin(self):
        """Forget the conversation, but for the system message."""
        self.messages = list(self.opening)

    def has_past(self):
        return len(self.messages) > len(self.opening)

    def answer(self, line, config, generator):
        """The reply to a line. UserError, and the line is forgotten, if the conversation is too long."""
        self.messages.append({"role": "user", "content": line})
        try:
            prompt = encode_prompt(self.tokenizer, self.messages)
            replies = generate(self.model, [prompt], config.max_new_tokens, self.tokenizer,
                               config.temperature, config.top_k, config.top_p, generator)
        except UserError:
            self.messages.pop()
            raise
        reply = replies.texts(self.tokenizer)[0]
        self.messages.append({"role": "assistant", "content": reply})
        return reply


def main(config):
    folders = config.compare or [config.model]
    device = pick_device(config.device)
    talkers = [Talker(name, folder, config, device) for name, folder in zip(short_names(folders), folders)]
    dtype = pick_dtype(config.dtype, device, talkers[0].model.config.n_embd)
    generator = torch.Generator(device).manual_seed(config.seed)
    # Whether it has been said that something is forgotten. Who asks for that needn't be told.
    said = config.history == "forget"
    typing = sys.stdin.isatty()
    if typing:
        print("your turn; /new forgets the conversation, /quit ends")
    while True:
        try:
            line = input("> " if typing else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        if line == "/new":
            for talker in talkers:
                talker.begin()
            continue
        if not line:
            continue
        for talker in talkers:
            if talker.forgets and talker.has_past():
                talker.begin()
                if not said:
                    print(f"({talker.name} was trained on single questions, so it forgets those before; "
                          "--history keep reminds it of them)")
                    said = True
            try:
                with autocast(device, dtype):
                    reply = talker.answer(line, config, generator)
            except UserError as error:
                print(f"({error}; /new begins afresh)")
                continue
            if config.compare:
                reply = f"{talker.name}: {reply}"
            print(reply, flush=True)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
