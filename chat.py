"""Talk to a checkpoint, or to several at once, in the terminal or on a page of this machine.

    python chat.py --model runs/demo/ppo
    python chat.py --compare runs/demo/sft runs/demo/ppo --reward runs/demo/reward
    python chat.py --compare runs/demo/sft runs/demo/ppo --web
    echo "What is the capital of France?" | python chat.py --model runs/demo/ppo

A line is your turn; a line that begins with a slash is a command:

    /new                    forget the conversation
    /set temperature 0.5    or top_k, top_p, max_new_tokens, seed; /set alone shows them
    /good, /bad             what you think of the last reply; /good 2 of the second model's
    /best 2                 the second model's reply is the best one, and all go on from it
    /save                   keep the conversation
    /quit, or Ctrl-D        the end

--out gets a line for each of these, on the disk at once: labels.jsonl for kto.py, preferences.jsonl for
reward.py and dpo.py, conversations.jsonl for sft.py and feedback.py. Each model keeps its own conversation.
One that has only ever been trained on single questions, as the demo's have, answers each by itself.
"""
import json
import math
import os
import queue
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from data import encode_dialogue, encode_prompt
from formats.families import knows_single_turns
from formats.model_folder import load_model
from generate import generate
from judges import load_reward_models, short_names
from model import GPT, last_scores
from plumbing.disk import folder_of
from plumbing.flags import Count, Natural, NonNegative, Seed, UserError, require
from plumbing.hardware import autocast, pick_device, pick_dtype
from plumbing.run import run_script
from plumbing.web import Refused, Server, page_of, serve, token_of

PAGE = Path(__file__).resolve().parent / "pages" / "chat.html"


@dataclass
class Config:
    model: str = "runs/demo/ppo"  # checkpoint folder
    compare: list[str] = field(default_factory=list)  # checkpoint folders that all answer, instead of --model
    reward: list[str] = field(default_factory=list)  # folders of reward models whose scores are shown
    history: Literal["auto", "keep", "forget"] = "auto"  # earlier turns; auto: if the model knows any
    system: str = ""  # system message at the head of the conversation
    out: str = "runs/chat"  # folder for what is kept
    temperature: NonNegative = 0.7  # of sampling; 0 takes the likeliest token
    top_k: Natural = 0  # sample among this many likeliest tokens, 0 for all
    top_p: Annotated[float, "> 0", "<= 1"] = 1.0  # sample among the fewest tokens with this much probability
    max_new_tokens: Count = 64  # longest reply, tokens
    seed: Seed = 0  # seed of the sampling
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of cuda, mps, cpu that works
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    threads: Natural = 0  # CPU threads, 0 leaves it to PyTorch
    web: bool = False  # open a page instead of the terminal
    host: str = "127.0.0.1"  # address to serve the page on; another one lets other machines in
    port: Natural = 8643  # port to serve it on, 0: any that is free
    browser: bool = True  # open it in a browser
    allow_pickle: bool = False  # also open pickled weights, which can run code; for folders you trust
    debug: bool = False  # show the traceback of an error


class Talker:
    """One of the models, and the conversation with it."""

    def __init__(self, name, folder, config, device):
        self.name, self.folder, self.config = name, folder, config
        self.model, self.tokenizer = load_model(folder, GPT, allow_pickle=config.allow_pickle)
        self.model.to(device).eval()
        context = self.model.config.block_size
        require(config.max_new_tokens < context,
                f"--max-new-tokens {config.max_new_tokens} fills the context of {context}")
        self.forgets = config.history == "forget"
        if config.history == "auto" and knows_single_turns(self.model.config):
            self.forgets = True
        self.rewards = [model.to(device).eval() for model in load_reward_models(
            config.reward, self.tokenizer, folder, config.allow_pickle)]
        self.opening = []
        if config.system:
            self.opening.append({"role": "system", "content": config.system})
        self.begin()

    def begin(self):
        """Forget the conversation, but for the system message."""
        self.messages = list(self.opening)

    def has_past(self):
        return len(self.messages) > len(self.opening)

    def has_reply(self):
        return self.has_past() and self.messages[-1]["role"] == "assistant"

    def answer(self, line, settings, generator, said=lambda piece: None):
        """The reply to a line, while it grows given to said piece by piece; and whether it ended by itself.

        UserError, and the line is forgotten, if the conversation is too long.
        """
        self.messages.append({"role": "user", "content": line})
        shown = 0

        def watch(replies):
            nonlocal shown
            text = replies.result().texts(self.tokenizer)[0]
            # What is not a whole letter yet waits for its other bytes.
            if not text.endswith("\ufffd"):
                said(text[shown:])
                shown = len(text)

        try:
            prompt = encode_prompt(self.tokenizer, self.messages)
            replies = generate(self.model, [prompt], settings["max_new_tokens"], self.tokenizer,
                               settings["temperature"], settings["top_k"], settings["top_p"], generator,
                               watch=watch)
        # Ctrl-C too: what was begun is not kept.
        except BaseException:
            self.messages.pop()
            raise
        reply = replies.texts(self.tokenizer)[0]
        said(reply[shown:])
        self.messages.append({"role": "assistant", "content": reply})
        return reply, bool(replies.ended[0])

    @torch.no_grad()
    def scores(self):
        """Of the last reply, one number from each reward model."""
        if not self.rewards:
            return []
        ids, mask = encode_dialogue(self.tokenizer, self.messages, last_only=True)
        require(len(ids) <= min(model.config.block_size for model in self.rewards),
                "the conversation is longer than the context of a --reward")
        ids, mask, lengths = torch.tensor([ids]), torch.tensor([mask]), torch.tensor([len(ids)])
        return [last_scores(model, ids.to(model.device), lengths, mask).item() for model in self.rewards]


class Chat:
    """All models, the settings, and what is kept."""

    def __init__(self, config):
        self.config = config
        folders = config.compare or [config.model]
        self.device = pick_device(config.device)
        names = short_names(folders)
        self.talkers = [Talker(name, folder, config, self.device) for name, folder in zip(names, folders)]
        self.dtype = pick_dtype(config.dtype, self.device, self.talkers[0].model.config.n_embd)
        self.reward_names = short_names(config.reward)
        self.settings = {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
        }
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        # Whether it has been said that something is forgotten. Who asks for that needn't be told.
        self.told = config.history == "forget"

    def begin(self):
        for talker in self.talkers:
            talker.begin()

    def notices(self):
        """Lines on what is forgotten now, before a new turn."""
        lines = []
        for talker in self.talkers:
            if talker.forgets and talker.has_past():
                talker.begin()
                if not self.told:
                    self.told = True
                    lines.append(f"({talker.name} was trained on single questions, so it forgets those "
                                 "before; --history keep reminds it of them)")
        return lines

    def answer(self, talker, line, said=lambda piece: None):
        """{reply, ended, scores: {reward model: number}} of one of the models."""
        with autocast(self.device, self.dtype):
            reply, ended = talker.answer(line, self.settings, self.generator, said)
            scores = dict(zip(self.reward_names, talker.scores()))
        return {"reply": reply, "ended": ended, "scores": scores}

    def set(self, words):
        """Change a setting, as a flag of its name would. UserError if it can't be that."""
        if words:
            name = words[0].replace("-", "_")
            require(len(words) == 2 and name in FITS,
                    f"/set takes one of {', '.join(FITS)}, and a number")
            try:
                number = (int if isinstance(self.settings[name], int) else float)(words[1])
                require(math.isfinite(number) and FITS[name](number), "")
            except (ValueError, UserError):
                raise UserError(f"/set {name}: {words[1]} is no value for it") from None
            self.settings[name] = number
            if name == "seed":
                self.generator.manual_seed(number)
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())

    def talker(self, number):
        """The model of a number from 1, that has a last reply. UserError without one."""
        require(1 <= number <= len(self.talkers),
                f"there is no model {number}, only 1 to {len(self.talkers)}")
        talker = self.talkers[number - 1]
        require(talker.has_reply(), f"{talker.name} has said nothing yet")
        return talker

    def keep(self, name, row):
        """Append a row to a file of --out. On the disk when it returns. UserError if it can't be."""
        path = Path(self.config.out) / f"{name}.jsonl"
        line = json.dumps(row | {"settings": dict(self.settings)}, ensure_ascii=False) + "\n"
        try:
            folder_of(path)
            with open(path, "ab") as file:
                file.write(line.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from None
        return f"kept in {path}"

    def label(self, number, good):
        talker = self.talker(number)
        return self.keep("labels", {"messages": talker.messages, "label": good, "model": talker.folder})

    def best(self, number):
        """Keep that one model's reply is better than the others', and let all go on from it."""
        winner = self.talker(number)
        prompts = [talker.messages[:-1] for talker in self.talkers]
        replies = [self.talker(i + 1).messages[-1]["content"] for i in range(len(self.talkers))]
        require(len(replies) > 1, "/best is for several models, see --compare")
        require(all(prompt == prompts[0] for prompt in prompts),
                "the conversations with them differ, so their replies can't be compared; /new begins afresh")
        ranks = [int(talker is not winner) for talker in self.talkers]
        require(len(set(replies)) > 1, "all of them say the same")
        said = self.keep("preferences", {"prompt": prompts[0], "completions": replies, "ranks": ranks,
                                         "models": [talker.folder for talker in self.talkers]})
        for talker in self.talkers:
            talker.messages[-1] = dict(winner.messages[-1])
        return said

    def save(self):
        require(any(talker.has_reply() for talker in self.talkers), "there is no conversation yet")
        for talker in self.talkers:
            if talker.has_reply():
                said = self.keep("conversations", {"messages": talker.messages, "model": talker.folder})
        return said

    def command(self, line):
        """Do a command other than /quit; returns what to say. UserError if there is no such thing."""
        name, *words = line.split()
        if name == "/new":
            self.begin()
            return ""
        if name == "/set":
            return self.set(words)
        if name == "/save":
            return self.save()
        number = int(words[0]) if words and words[0].isdecimal() else 1
        if name in ("/good", "/bad"):
            return self.label(number, name == "/good")
        if name == "/best":
            return self.best(number)
        raise UserError(f"there is no {name}: /new, /set, /good, /bad, /best, /save, /quit")


FITS = {
    "temperature": lambda x: x >= 0,
    "top_k": lambda x: x >= 0,
    "top_p": lambda x: 0 < x <= 1,
    "max_new_tokens": lambda x: x >= 1,
    "seed": lambda x: 0 <= x < 2**63,
}


# ---------------------------------------------------------------------------------------------------------
# In the terminal

def shown_scores(found):
    """The scores of a reply, and that it was cut off, as the end of a line."""
    parts = [f"{name} {score:.2f}" for name, score in found["scores"].items()]
    if not found["ended"]:
        parts.append("cut off")
    return f"  ({', '.join(parts)})" if parts else ""


def talk(chat):
    """Read lines and answer them until the end."""
    typing = sys.stdin.isatty()
    if typing:
        print("your turn; /new forgets the conversation, /quit ends, --help lists the other commands")
    while True:
        try:
            line = input("> " if typing else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line == "/quit":
            break
        if line.startswith("/"):
            try:
                said = chat.command(line)
            except UserError as error:
                said = f"({error})"
            if said:
                print(said, flush=True)
            continue
        if not line:
            continue
        for notice in chat.notices():
            print(notice)
        for talker in chat.talkers:
            begun = [f"{talker.name}: " if chat.config.compare else ""]

            def said(piece):
                # Once the reply begins: without one there is an error.
                print("".join(begun) + piece, end="", flush=True)
                begun.clear()

            try:
                found = chat.answer(talker, line, said)
                print(shown_scores(found) if typing or found["scores"] else "", flush=True)
            except UserError as error:
                print(f"({error}; /new begins afresh)")
            except KeyboardInterrupt:
                print(" (stopped)", flush=True)


# ---------------------------------------------------------------------------------------------------------
# On a page

def routes(chat):
    """What the page may ask for, see `plumbing.web.Server`."""

    def begin(body):
        return {"models": [talker.name for talker in chat.talkers], "settings": chat.settings,
                "rewards": chat.reward_names, "messages": [talker.messages for talker in chat.talkers]}

    def say(body):
        line = body.get("line")
        if not isinstance(line, str) or not line.strip():
            raise Refused(400, "a turn is a text")
        return streamed(chat, line.strip())

    def command(body):
        line = body.get("line")
        if not isinstance(line, str) or not line.startswith("/"):
            raise Refused(400, "a command begins with /")
        return {"said": chat.command(line)} | begin(body)

    return {"/begin": begin, "/say": say, "/command": command}


def streamed(chat, line):
    """Yield what happens while all answer a line: {notice}, {model, piece}, {model, reply, ended, scores}."""
    for notice in chat.notices():
        yield {"notice": notice}
    for number, talker in enumerate(chat.talkers):
        pieces = queue.SimpleQueue()

        def answer():
            try:
                pieces.put(chat.answer(talker, line, lambda piece: pieces.put({"piece": piece})))
            except Exception as error:
                pieces.put({"error": str(error)})

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            while True:
                piece = pieces.get()
                yield {"model": number} | piece
                if "piece" not in piece:
                    break
        finally:
            # A page that is closed meanwhile leaves no reply half said.
            thread.join()


def main(config):
    require(config.web or (config.host, config.port) == (Config.host, Config.port),
            "--host and --port are for --web")
    if config.threads:
        torch.set_num_threads(config.threads)
    chat = Chat(config)
    if not config.web:
        talk(chat)
        return
    folder = Path(config.out)
    folder_of(folder / "x")
    server = Server(config.host, config.port, page_of(PAGE), routes(chat), token_of(folder))
    serve(server, config.browser and sys.stdout.isatty())


if __name__ == "__main__":
    run_script(main, Config, __doc__)
