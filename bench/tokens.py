"""Token ids: every text and every conversation of data files through our tokenizers and through transformers'
own.

    python bench/tokens.py --model FOLDER --data FILE [FILE ...]    a checkpoint folder, against AutoTokenizer
    python bench/tokens.py --model gpt2 --data FILE [FILE ...]      ours, against AutoTokenizer on the folder
                                                                    that it saves

With --reference FOLDER, GPT-2's own vocabulary and merges (vocab.json and merges.txt, or encoder.json and
vocab.bpe) are the peer for gpt2. Needs transformers (requirements-hf.txt). One line per file; exit code 1 if
anything differs. Compared are
    texts     every string in every row (of a .txt file: every line, and the whole), as it is and with a
              special token's text put into it
    chats     every conversation, and every prompt with its reply, if no special token's text is in it: as a
              prompt that awaits the assistant and as a whole, which ours ends at the end token, whatever line
              break the template puts behind it
"""
import argparse
import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
try:
    import transformers
except ModuleNotFoundError:
    print("error: transformers is missing; pip install -r requirements-hf.txt transformers", file=sys.stderr)
    sys.exit(2)

from data import encode_dialogue, encode_prompt
from formats.foreign_tokenizer import open_tokenizer
from formats.tokenizer import Tokenizer
from plumbing.flags import UserError

# ShareGPT's words for who speaks.
ROLES = {"human": "user", "gpt": "assistant"}
# What files call a prompt, and a reply to it.
QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("output", "response", "chosen", "rejected", "answer")


def read(path):
    """The rows of a file: JSON objects, or of a .txt file {"text": ...} for the whole and for each line."""
    raw = Path(path).read_bytes()
    if path.endswith(".gz"):
        raw = gzip.decompress(raw)
    text = raw.decode("utf-8-sig")
    lines = text.split("\n")
    if path.endswith(".txt"):
        return [{"text": part} for part in (text, *lines)]
    if path.endswith(".json"):
        return json.loads(text)
    return [json.loads(line) for line in lines if line.strip()]


def strings(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    parts = []
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, list):
        parts = value
    for part in parts:
        yield from strings(part)


def turn(value):
    """A message from a JSON object, or None if it isn't one."""
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        content = value.get("content", value.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}


def conversations(row):
    """The conversations of a row that end with the assistant."""
    for value in row.values():
        if isinstance(value, list) and value and all(map(turn, value)):
            for whole in continued([turn(part) for part in value], row):
                if whole[-1]["role"] == "assistant":
                    yield whole
    question = next((row[key] for key in QUESTIONS if isinstance(row.get(key), str)), None)
    for key in ANSWERS:
        answer = row.get(key)
        if question and isinstance(answer, str):
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def continued(messages, row):
    """Messages with each of the replies that their row has to them; if it has none, the messages alone."""
    replies = []
    for key in ("chosen", "rejected"):
        if reply := turn(row.get(key)):
            replies.append(reply)
    return [[*messages, reply] for reply in replies] or [messages]


def compare(path, ours, peer):
    """(texts, chats, tokens, differences) of a file."""
    rows = read(path)
    special = sorted(token.content for token in peer.added_tokens_decoder.values() if token.special)
    texts = [text for row in rows for text in strings(row)]
    chats = []
    for row in rows:
        for messages in conversations(row):
            if not any(holds(message["content"], special) for message in messages):
                chats.append(messages)
    tokens, differences = compare_texts(texts, special, ours, peer)
    more_tokens, more_differences = compare_chats(chats, ours, peer)
    return len(texts), len(chats), tokens + more_tokens, differences + more_differences


def holds(text, special):
    """Whether one of the special tokens' texts is in a text."""
    return any(token in text for token in special)


def compare_texts(texts, special, ours, peer):
    """(tokens, differences) of texts, as they are and with a special token's text in their middle."""
    marked = []
    for i, text in enumerate(texts):
        middle = len(text) // 2
        marked.append(text[:middle] + special[i % len(special)] + text[middle:])
    tokens = differences = 0
    for text in texts + marked:
        ids = ours.encode(text)
        tokens += len(ids)
        theirs = peer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        differences += ids != theirs
    for text in texts:
        if not holds(text, special):
            differences += ours.encode(text) != peer(text, add_special_tokens=False)["input_ids"]
    return tokens, differences


def compare_chats(chats, ours, peer):
    """(tokens, differences) of conversations, lists of messages that end with the assistant."""
    def chat(messages, waiting):
        return peer.apply_chat_template(messages, add_generation_prompt=waiting)["input_ids"]

    # What the template puts behind the end token, where ours ends.
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    behind = chat(probe, False)[len(encode_dialogue(ours, probe)[0]):]
    tokens = differences = 0
    for messages in chats:
        ids, _ = encode_dialogue(ours, messages)
        prompt = encode_prompt(ours, messages[:-1])
        tokens += len(ids)
        same = ids + behind == chat(messages, False)
        same = same and prompt == chat(messages[:-1], True)
        differences += not (same and ids[:len(prompt)] == prompt)
    return tokens, differences


def first_file(folder, names):
    """The first of some files that a folder has."""
    return next(folder / name for name in names if (folder / name).is_file())


def gpt2_of(folder, template):
    """transformers' GPT-2 tokenizer from OpenAI's or Hugging Face's files, with our control tokens."""
    vocab = first_file(folder, ("vocab.json", "encoder.json")).read_text(encoding="utf-8")
    merges = first_file(folder, ("merges.txt", "vocab.bpe")).read_text(encoding="utf-8")
    # The first line names the version.
    pairs = [tuple(line.split()) for line in merges.split("\n")[1:] if line]
    peer = transformers.GPT2Tokenizer(json.loads(vocab), pairs)
    control = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    peer.add_special_tokens({"additional_special_tokens": control})
    peer.chat_template = template
    return peer


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint folder, or gpt2")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE",
                        help=".json, .jsonl, .jsonl.gz or .txt")
    parser.add_argument("--reference", default="", metavar="FOLDER", help="GPT-2's own files")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model == "gpt2":
            ours = Tokenizer.gpt2()
            ours.save(folder)
        else:
            ours = open_tokenizer(args.model)
            folder = args.model
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    if args.reference:
        peer = gpt2_of(Path(args.reference), peer.chat_template)
    failed = 0
    for path in args.data:
        texts, chats, tokens, differences = compare(path, ours, peer)
        failed += differences
        print(f"{path}: {texts} texts, {chats} chats, {tokens} tokens, {differences} differences", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
