"""Text to token ids and back: the tokenizer, and the dialogue template with its response mask."""
import base64
import json
import re
from collections import Counter
from pathlib import Path

import tiktoken

from runtime import UserError, write_atomically

# ---------------------------------------------------------------------------------------------------------
# Tokenizer

CONTROLS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")


class Tokenizer:
    """A byte-level BPE (tiktoken) with five control tokens that ordinary text can never produce.

    Attributes: n_vocab, and the control ids eos, pad, system, user, assistant.
    """

    def __init__(self, name, pattern, ranks):
        specials = {token: len(ranks) + i for i, token in enumerate(CONTROLS)}
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.eos, self.pad, self.system, self.user, self.assistant = specials.values()
        self.n_vocab = len(ranks) + len(CONTROLS)

    @classmethod
    def named(cls, name):
        """The `toy` task's tokenizer, or `gpt2`: its 50,256 byte pairs, then <|endoftext|> at its usual id, then our controls."""
        if name == "toy":
            import toy  # which builds on this file
            return toy.tokenizer()
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken fetches the file on first use: any network error may come up
            raise UserError("the gpt2 tokenizer is not in tiktoken's cache and could not be fetched "
                            f"({type(error).__name__}); go online once, or point TIKTOKEN_CACHE_DIR at a cache") from None
        return cls("gpt2", encoding._pat_str, encoding._mergeable_ranks)

    def encode(self, text):
        """Text to ids; control tokens in the text are encoded as the characters they are."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, control tokens left out."""
        return self.encoding.decode([i for i in ids if i < len(self.ranks)], errors="replace")

    def show(self, i):
        """One id as readable text, control tokens included."""
        return CONTROLS[i - len(self.ranks)] if i >= len(self.ranks) else self.encoding.decode([i], errors="replace")

    def save(self, path):
        """Write name, pattern and ranks as JSON, so that a checkpoint folder needs no network to be opened."""
        ranks = [base64.b64encode(token).decode() for token in sorted(self.ranks, key=self.ranks.get)]
        write_atomically(path, json.dumps({"name": self.name, "pattern": self.pattern, "ranks": ranks}).encode())

    @classmethod
    def load(cls, path):
        """Read what `save` wrote."""
        try:
            saved = json.loads(Path(path).read_text())
            return cls(saved["name"], saved["pattern"], {base64.b64decode(t, validate=True): i for i, t in enumerate(saved["ranks"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def train_bpe(texts, n_vocab, pattern=r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"):
    """Learn byte-pair ranks from texts (Sennrich et al. 2016): at most n_vocab of them, the 256 bytes first.

    Returns (pattern, {bytes: rank}) for `Tokenizer`. Ties go to the pair that sorts first, so it is repeatable.
    """
    words = Counter(piece for text in texts for piece in re.findall(pattern, text))
    ranks = {bytes([b]): b for b in range(256)}
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    while len(ranks) < n_vocab:
        pairs = Counter()
        for word, parts in split.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[left + right] = len(ranks)
        for word, parts in split.items():
            i = 0
            while i < len(parts) - 1:
                if parts[i] == left and parts[i + 1] == right:
                    parts[i:i + 2] = [left + right]
                i += 1
    return pattern, ranks


# ---------------------------------------------------------------------------------------------------------
# Dialogue template: <|system|>text <|user|>text <|assistant|>reply<|endoftext|> <|user|>... (no spaces between)

def encode_prompt(tokenizer, messages):
    """Ids of a conversation that awaits the assistant: every turn, then <|assistant|>. messages: [{role, content}]."""
    return encode_dialogue(tokenizer, messages)[0] + [tokenizer.assistant]


def encode_reply(tokenizer, text):
    """Ids of an assistant's reply: the text, then the end token. Appending them to a prompt's ids is the whole dialogue."""
    return tokenizer.encode(text) + [tokenizer.eos]


def encode_dialogue(tokenizer, messages):
    """Ids of a whole conversation, and a mask that is True on what the assistant says, end tokens included."""
    ids, mask = [], []
    for message in messages:
        ids.append(getattr(tokenizer, message["role"]))
        mask.append(False)
        answer = message["role"] == "assistant"
        content = encode_reply(tokenizer, message["content"]) if answer else tokenizer.encode(message["content"])
        ids += content
        mask += [answer] * len(content)
    return ids, mask


def describe(tokenizer, ids, mask):
    """One example as text, the part that mask selects set in [[ ]]."""
    text, inside = "", False
    for i, m in zip(ids, mask):
        text += ("[[" if m and not inside else "]]" if inside and not m else "") + tokenizer.show(i)
        inside = m
    return text + ("]]" if inside else "")
