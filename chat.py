"""Talk to a checkpoint in the terminal; with --compare, to several at once.

    python chat.py --model runs/demo/ppo
    python chat.py --compare runs/demo/sft runs/demo/ppo
    echo "What is the capital of France?" | python chat.py --model runs/demo/ppo

A line is your turn. /new forgets the conversation, /quit or Ctrl-D ends. Each model keeps its own conversation.
One that has only ever been trained on single questions, as the demo's have, answers each by itself.
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
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0  # sample among the fewest tokens that have this much probability
    max_new_tokens: Count = 64  # longest reply, tokens
    seed: Seed = 0  # seed of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto takes the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    allow_pickle: bool = False  # also open weights that are pickles (pytorch_model.bin), which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


def main(config):
    folders = config.compare or [config.model]
    names = short_names(folders)
    device = pick_device(config.device)
    loaded = [load_model(folder, GPT, allow_pickle=config.allow_pickle) for folder in folders]
    dtype = pick_dtype(config.dtype, device, loaded[0][0].config.n_embd)
    for model, _ in loaded:
        model.to(device).eval()
        require(config.max_new_tokens < model.config.block_size, f"--max-new-tokens {config.max_new_tokens} fills the context of {model.config.block_size}")
    generator = torch.Generator(device).manual_seed(config.seed)
    opening = [{"role": "system", "content": config.system}] if config.system else []
    talks = [list(opening) for _ in folders]
    forgets = [config.history == "forget" or (config.history == "auto" and knows_single_turns(model.config))
               for model, _ in loaded]
    said = config.history == "forget"  # that something is forgotten
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
            talks = [list(opening) for _ in folders]
        elif line:
            for name, (model, tokenizer), talk, forget in zip(names, loaded, talks, forgets):
                if forget and len(talk) > len(opening):
                    talk[:] = opening
                    if not said:
                        print(f"({name} was trained on single questions, so it forgets those before; "
                              "--history keep reminds it of them)")
                        said = True
                talk.append({"role": "user", "content": line})
                try:
                    with autocast(device, dtype):
                        reply = generate(model, [encode_prompt(tokenizer, talk)], config.max_new_tokens, tokenizer, config.temperature,
                                         config.top_k, config.top_p, generator).texts(tokenizer)[0]
                except UserError as error:
                    talk.pop()
                    print(f"({error}; /new begins afresh)")
                    continue
                talk.append({"role": "assistant", "content": reply})
                print(f"{name}: {reply}" if config.compare else reply, flush=True)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
