"""Text to token ids and back: our own tokenizer, other folders' tokenizers, and dialogue templates with their response masks.

Two promises hold for both: text never becomes a control token, whatever it says, and a dialogue's ids begin with the ids of its prompt.
"""
import heapq
import json
import math
import re
from array import array
from collections import Counter, defaultdict
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import regex  # which tiktoken brings along
import tiktoken

from chat_template import ChatTemplate, either, find_template, one_line, optional, own_template
from flags import TOKENIZER_FILES, UserError, require
from formats import read_rows, split_by_prompt
from saving import write_atomically

# ---------------------------------------------------------------------------------------------------------
# Our own tokenizer

CONTROLS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
ROLES = ("system", "user", "assistant")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in byte-level BPE files;
LETTERS = {bytes([b]): chr(b) for b in PRINTABLE}  # the others take the characters from 256 on, in order
LETTERS |= {bytes([b]): chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


class Tokenizer:
    """A byte-level BPE (tiktoken) with five control tokens that ordinary text can never produce.

    Attributes: n_vocab, ids run from 0 to n_vocab - 1; added, how many of the last have untrained embeddings; eos ends a
    reply; pad fills; stops, the ids that end generation; document stands around plain text; roles, {role: id}.
    """
    added = 0

    def __init__(self, name, pattern, ranks):
        specials = {token: len(ranks) + i for i, token in enumerate(CONTROLS)}
        self.name, self.pattern, self.ranks = name, pattern, ranks
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.eos, self.pad, self.system, self.user, self.assistant = specials.values()
        self.document, self.stops = self.eos, (self.eos,)
        self.roles = dict(zip(ROLES, (self.system, self.user, self.assistant)))
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

    def encode(self, text, after="start"):
        """Text to ids; control tokens in the text are encoded as the characters they are. after: see FolderTokenizer."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """Ids to text, without control tokens and ids that don't exist."""
        return self.encoding.decode([i for i in ids if 0 <= i < len(self.ranks)], errors="replace")

    def show(self, *ids):
        """Ids as readable text, control tokens included."""
        if all(0 <= i < self.n_vocab for i in ids):
            return self.encoding.decode(ids, errors="replace")
        return "".join(self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>" for i in ids)

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        return isinstance(other, Tokenizer) and (self.pattern, self.ranks) == (other.pattern, other.ranks)

    @cached_property
    def files(self):
        """{name: bytes} of the files that `transformers` opens this tokenizer from."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "barerlhf_name": self.name,
                  "bos_token": CONTROLS[0], "eos_token": CONTROLS[0], "pad_token": CONTROLS[1], "chat_template": own_template(CONTROLS[0])}
        vocab = {"".join(LETTERS[bytes([b])] for b in token): rank for token, rank in self.ranks.items()}
        return {"tokenizer.json": json_bytes(library_json(self.pattern, vocab, find_merges(self.ranks))),
                "tokenizer_config.json": json_bytes(config)}

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json to a checkpoint folder."""
        save_files(self, folder)

    @classmethod
    def from_files(cls, saved, config):
        """The tokenizer that `save` wrote, from its two files' contents; None if they are another's, ValueError if damaged."""
        try:
            vocab, merges = saved["model"]["vocab"], saved["model"]["merges"]
            pattern = saved["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            if not isinstance(pattern, str) or saved != library_json(pattern, vocab, merges):
                return None
        except (KeyError, TypeError, IndexError, AttributeError):
            return None
        try:
            ranks = {b"".join(BYTES[letter] for letter in token): rank for token, rank in vocab.items()}
            made = [vocab[merge.replace(" ", "", 1)] for merge in merges]
        except (KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        if sorted(map(repr, ranks.values())) != sorted(map(repr, range(len(ranks)))):
            raise ValueError("its ids are not 0, 1, 2, ...")
        if not all(a < b for a, b in pairwise(made)):
            raise ValueError("its merges are not in the order of its ids")
        name = config.get("barerlhf_name")
        return cls(name if isinstance(name, str) else "saved", pattern, dict(sorted(ranks.items(), key=lambda item: item[1])))


def library_json(pattern, vocab, merges):
    """Our tokenizer as the `tokenizers` library writes it. A piece that is a token is taken whole, as tiktoken does."""
    controls = [{"id": len(vocab) + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                 "special": True} for i, token in enumerate(CONTROLS)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": controls, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, "model": model}


def find_merges(ranks):
    """The merges behind ranks, in their order: each token's last one, its bytes being merged by lower ranks alone.

    A token that this leaves in three parts or more has none: no merging ever makes it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(LETTERS[bytes([b])] for b in part) for part in parts))
    return merges


def json_bytes(value):
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def save_files(tokenizer, folder):
    """Write a tokenizer's files to a checkpoint folder, each atomically."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in tokenizer.files.items():
        write_atomically(Path(folder) / name, data)


# How a text is cut into pieces that no token crosses: words, numbers, punctuation, with the space before them.
# That of the toy task knows the letters of English alone; GPT-2's knows all (\p{L}; Python's re does not).
ENGLISH = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"
ALL_LETTERS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts, n_vocab, pattern=ENGLISH):
    """Learn byte-pair ranks from texts (Sennrich et al. 2016): at most n_vocab of them, the 256 bytes first.

    Returns (pattern, {bytes: rank}) for `Tokenizer`. Ties go to the pair that sorts first, so it is repeatable.
    """
    words = Counter(piece for text in texts for piece in regex.findall(pattern, text))
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)
    # All words, one behind the other, between marks of -1: at each place a token's id, and how often its word
    # comes. A merged pair leaves the new token at its first place; its second is passed over from then on.
    ids, times = array("i", [-1]), array("q", [0])
    for word, count in words.items():
        letters = word.encode()
        ids.extend([*letters, -1])
        times.extend([count] * (len(letters) + 1))
    before, after = array("i", range(-1, len(ids) - 1)), array("i", range(1, len(ids) + 1))

    counts, places = Counter(), defaultdict(lambda: array("i"))  # of each pair
    for place, pair in enumerate(pairwise(ids)):
        if -1 not in pair:
            counts[pair] += times[place]
            places[pair].append(place)
    # The most frequent pair comes first. A count that is out of date is put right when its turn comes.
    heap = [(-count, tokens[left], tokens[right], left, right) for (left, right), count in counts.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_vocab:
        count, *_, left, right = entry = heapq.heappop(heap)
        if -count != counts[left, right]:
            if counts[left, right] > 0:
                heapq.heappush(heap, (-counts[left, right], *entry[1:]))
            continue
        new = ranks.setdefault(tokens[left] + tokens[right], len(ranks))
        if new == len(tokens):
            tokens.append(tokens[left] + tokens[right])
        grown = set()
        for place in sorted(places.pop((left, right))):  # of aaa, the first two are the pair
            second = after[place]
            if ids[place] != left or ids[second] != right:
                continue  # one of them is part of a longer token by now
            count, previous, following = times[place], before[place], after[second]
            ids[place], ids[second] = new, -1
            after[place], before[following] = following, place
            if ids[previous] >= 0:
                counts[ids[previous], left] -= count
                counts[ids[previous], new] += count
                places[ids[previous], new].append(previous)
                grown.add((ids[previous], new))
            if ids[following] >= 0:
                counts[right, ids[following]] -= count
                counts[new, ids[following]] += count
                places[new, ids[following]].append(place)
                grown.add((new, ids[following]))
        del counts[left, right]
        for left, right in grown:
            if counts[left, right] > 0:
                heapq.heappush(heap, (-counts[left, right], tokens[left], tokens[right], left, right))
    return pattern, ranks


LEARNED_FROM = 5_000_000  # characters, at most: some seconds of English, a minute of Chinese


def scratch_tokenizer(config):
    """The tokenizer of a model from scratch, as --tokenizer names it. config: a training script's."""
    name = config.tokenizer
    if name == "auto":
        name = "toy" if config.data == "toy" else "gpt2"
    if name in ("gpt2", "toy"):
        return Tokenizer.named(name)
    if name and Path(name).is_dir():
        return open_tokenizer(name)
    form = re.fullmatch(r"bpe:([0-9]{3,6})", name)
    require(form and 300 <= int(form[1]) <= 200_000,
            f"--tokenizer {name}: write auto, gpt2, toy, a checkpoint's or tokenizer's folder (there is none "
            "of this name), or bpe:N to learn N tokens from --data, N from 300 to 200000")
    require(config.data != "toy",
            f"--tokenizer {name} learns from files, and the toy task has a tokenizer of its own (auto)")
    if config.resume and (Path(config.out) / "tokenizer.json").is_file():
        return open_tokenizer(config.out)  # what was learned then: with --override the data may be another
    return Tokenizer("bpe", *train_bpe(texts_to_learn(config), int(form[1]), ALL_LETTERS))


def texts_to_learn(config):
    """Prompts and replies of the rows of --data that are trained on; of large files, the start of each."""
    try:
        rows = read_rows(config.data, "demonstrations", lambda text: None, config.part, config.skip_bad)
    except UserError:  # prompts alone
        rows = read_rows(config.data, "prompts", lambda text: None, config.part, config.skip_bad)
    rows, _ = split_by_prompt(rows, config.val_fraction)
    texts = [text for row in rows for text in [*(turn["content"] for turn in row.prompt), *row.replies]]
    share = min(1, LEARNED_FROM / max(1, sum(map(len, texts))))
    return [text[:math.ceil(share * len(text))] for text in texts]


# ---------------------------------------------------------------------------------------------------------
# Other folders' tokenizers

FILE_LIMIT = 64 << 20  # bytes


def open_tokenizer(folder):
    """The tokenizer of a checkpoint folder, ours or another's. UserError names the file that is missing or damaged."""
    folder = Path(folder)
    files = {}
    for name in (*TOKENIZER_FILES, "config.json"):
        if (folder / name).is_file():
            require((folder / name).stat().st_size <= FILE_LIMIT, f"{folder / name} is too large for a tokenizer's file")
            files[name] = (folder / name).read_bytes()
    saved = read_json(folder, files, "tokenizer.json")
    try:
        ours = Tokenizer.from_files(saved, read_json(folder, files, "tokenizer_config.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer.json'} is damaged ({one_line(error)})") from None
    return ours or FolderTokenizer(folder, files, saved)


def read_json(folder, files, name):
    """The JSON object in a folder's file, {} where there is none; UserError if it is damaged."""
    try:
        value = json.loads(files.get(name, b"{}").decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name} is damaged ({one_line(error)})") from None
    require(isinstance(value, dict), f"{folder / name} is damaged (it holds no JSON object)")
    return value


class FolderTokenizer:
    """Another project's tokenizer, through the `tokenizers` library; its dialogues follow its folder's chat template.

    Attributes as Tokenizer's. Where the folder has no chat template, ours is used and the control tokens that it lacks are
    added at the end (`added`); with one, roles is None. files: {name: bytes} for `save`, amended by what was added.
    """

    def __init__(self, folder, files, saved):
        self.folder, self.name = folder, folder.name
        config, names, generation, model = (read_json(folder, files, name) for name in (
            "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"))
        words = {key: word for key in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
                 if (word := content_of(config.get(key)) or content_of(names.get(key)))}
        extra = [content_of(word) for source in (config, names) for key in ("additional_special_tokens", "extra_special_tokens")
                 for word in (source.get(key) if isinstance(source.get(key), list) else [])]
        self.engine = load_library(folder, files, saved, config, [*words.values(), *filter(None, extra)])
        size = self.n_vocab = max(self.engine.get_vocab().values(), default=-1) + 1

        def ids(*values):  # token ids as configurations give them: none, one or a list
            return [i for value in values for i in (value if isinstance(value, list) else [value]) if type(i) is int and 0 <= i < size]

        def named(key):  # an id by its word or, failing that, by number
            number = self.engine.token_to_id(words.get(key, ""))
            return next(iter(ids(number, generation.get(key + "_id"), model.get(key + "_id"))), None)

        eos, bos = named("eos_token"), named("bos_token")
        endings = ids(eos, generation.get("eos_token_id"), None if "generation_config.json" in files else model.get("eos_token_id"))
        self._make_special([self.engine.id_to_token(i) for i in ids(endings, bos)])
        source = find_template(folder, files, config)
        ours = source is None or eos is not None and source == own_template(self.engine.id_to_token(eos))
        self.template = None if ours else ChatTemplate(folder, source, words, self.specials)
        if self.template:
            eos = self.specials.get(self.template.ending, eos)
        require(eos is not None, f"{folder} names no token that ends a reply (eos_token in tokenizer_config.json)")
        self.eos, self.stops = eos, tuple(dict.fromkeys([eos, *endings]))
        self.document = self.specials.get("<|endoftext|>", eos if bos is None else bos)
        # a filler that can't be taken for the end of a reply: transformers finds a sequence's last token by != pad
        free = [word for word, i in self.specials.items() if i not in (*self.stops, bos)]
        unused = [word for word in free if not (self.template and word in source + self.template.sample)]
        unused.sort(key=lambda word: self.specials[word] == self.document)
        pads = [word for word in free if "pad" in word.lower()] + [word for word in free if word == words.get("unk_token")] + unused
        pad = (pads or [CONTROLS[1]])[0]
        self._make_special([pad, *(CONTROLS[2:] if ours else [])])
        self.pad, self.added = self.specials[pad], self.n_vocab - size
        self.roles = {role: self.specials[f"<|{role}|>"] for role in ROLES} if ours else None
        self._learn_spaces()
        self.files = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
        self._amend(saved, config, names, generation, words)

    def _make_special(self, words):
        """Have words as special tokens, new ones at the end; UserError if the library gives them other ids."""
        tokens = {token.content: token for token in self.engine.get_added_tokens_decoder().values()}
        for word in words:
            if word not in tokens or not tokens[word].special:
                known = self.engine.token_to_id(word)
                self.engine.add_special_tokens([optional("tokenizers").AddedToken(word, special=True, normalized=False)])
                i = self.engine.token_to_id(word)
                require(i == (self.n_vocab if known is None else known), f"{self.folder}: its tokenizer has gaps in its ids, so {word} can't be added")
                self.n_vocab = max(self.n_vocab, i + 1)
        self.specials = {token.content: i for i, token in sorted(self.engine.get_added_tokens_decoder().items()) if token.special}

    def _learn_spaces(self):
        """Find out which special tokens the model makes of their own text, and where the library puts a space before text."""
        library, tokens = self.engine, self.engine.get_added_tokens_decoder().values()
        self.eaten = {side: {token.content for token in tokens if getattr(token, side)} for side in ("lstrip", "rstrip")}
        after_special = self._raw(library.id_to_token(self.eos) + "a")[1:]
        library.encode_special_tokens = True  # as ordinary text, from here on
        plain, self.newline = self._raw("a"), self._raw("\n")
        self.spaced = {"start": False, "special": after_special != plain, "text": self._raw("\na") != self.newline + plain}
        self.leaky = re.compile(f"({either(word for word, i in self.specials.items() if i in self._raw(word))})")
        self.special = re.compile(f"({either(self.specials)})")

    def _raw(self, text):
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode(self, text, after="start"):
        """Text to ids; special tokens in the text are encoded as the characters they are.

        after: what stands before the text ("start", "text" or "special"), as some tokenizers put a space before some texts.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone halves of a character, as tiktoken does
        if self.leaky.search(text):  # letter by letter, so that the model can't put the special token together
            pieces = [piece for i, part in enumerate(self.leaky.split(text)) for piece in (part if i % 2 else [part]) if piece]
            return [i for n, piece in enumerate(pieces) for i in self._spaced(piece, "text" if n else after)]
        return self._spaced(text, after)

    def _spaced(self, text, after):
        if self.spaced[after]:  # behind a line break there is no space
            ids = self._raw("\n" + text)
            if ids[:len(self.newline)] == self.newline:
                return ids[len(self.newline):]
        return self._raw(text)

    def decode(self, ids):
        """Ids to text, without special tokens and ids that don't exist."""
        return self.engine.decode([i for i in ids if 0 <= i < self.n_vocab], skip_special_tokens=True)

    def show(self, *ids):
        """Ids as readable text, special tokens included."""
        if not all(0 <= i < self.n_vocab for i in ids):
            return "".join(self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>" for i in ids)
        once, twice = (self.engine.decode(ids * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once):]  # a space before the first word would be lost at the start of a text

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        def known(t):
            return t.engine.to_str(), t.template and t.template.source, t.eos, t.pad, t.document, set(t.stops)
        return isinstance(other, FolderTokenizer) and known(self) == known(other)

    def save(self, folder):
        """Write the files that this was read from to a checkpoint folder, with what was added to them."""
        save_files(self, folder)

    def _amend(self, saved, config, names, generation, words):
        """Bring the files in line with pad, stops, added tokens and our template, so that transformers opens the same tokenizer."""
        decoder = {i: {key: getattr(token, key) for key in ("content", "single_word", "lstrip", "rstrip", "normalized", "special")}
                   for i, token in sorted(self.engine.get_added_tokens_decoder().items())}
        if "tokenizer.json" in self.files:
            tokens = [{"id": i, **token} for i, token in decoder.items()]
            if sorted(saved.get("added_tokens") or [], key=lambda token: token["id"]) != tokens:
                self.files["tokenizer.json"] = json_bytes(saved | {"added_tokens": tokens})
        special = {"pad_token": self.engine.id_to_token(self.pad)}
        changes = {"tokenizer_config.json": dict(special), "special_tokens_map.json": special,
                   "generation_config.json": {"pad_token_id": self.pad, "eos_token_id": list(self.stops) if self.stops[1:] else self.eos}}
        if self.roles or self.added:  # with added_tokens_decoder, transformers reads no other file's tokens
            changes["tokenizer_config.json"] |= {key: words[key] for key in ("bos_token", "unk_token") if key in words}
            changes["tokenizer_config.json"] |= {"eos_token": words.get("eos_token", self.engine.id_to_token(self.eos)),
                                                 "added_tokens_decoder": {str(i): token for i, token in decoder.items()}}
        if self.roles and "chat_template.jinja" not in self.files:
            changes["tokenizer_config.json"]["chat_template"] = own_template(self.engine.id_to_token(self.eos))
        kind = "PreTrainedTokenizerFast" if "tokenizer.json" in self.files else "GPT2Tokenizer"
        for name, before in (("tokenizer_config.json", config), ("special_tokens_map.json", names), ("generation_config.json", generation)):
            if (name in self.files or name == "tokenizer_config.json") and before != (after := before | changes[name]):
                self.files[name] = json_bytes({"tokenizer_class": kind} | after if name == "tokenizer_config.json" else after)

    def encode_pieces(self, pieces, hidden):
        """Ids and mask of rendered pieces [(text, whether it is a reply)]; hidden: {stand-in: special token's text} of contents."""
        ids, mask, before = [], [], None
        for text, reply in pieces:
            start, parts = len(ids), self.special.split(text)
            for i, part in enumerate(parts):
                if i % 2:
                    ids.append(self.specials[part])
                    before = part
                    continue
                part = part.lstrip() if before in self.eaten["rstrip"] else part
                part = part.rstrip() if i + 1 < len(parts) and parts[i + 1] in self.eaten["lstrip"] else part
                if part:
                    ids += self.encode("".join(hidden.get(letter, letter) for letter in part) if hidden else part,
                                       "start" if before is None else "special" if before else "text")
                    before = ""
            if reply and ids[start:][-1:] != [self.eos]:  # the template ends a turn with no special token
                ids.append(self.eos)
                before = self.engine.id_to_token(self.eos)
            mask += [reply] * (len(ids) - start)
        return ids, mask


def load_library(folder, files, saved, config, special):
    """A `tokenizers.Tokenizer` from a folder's files, with the tokens that its configuration adds; special: words to make special tokens."""
    tokenizers = optional("tokenizers")
    name = "tokenizer.json" if "tokenizer.json" in files else "merges.txt" if "vocab.json" in files else "tokenizer.json"
    hint = "; open and save the tokenizer with transformers once to make it" if "tokenizer.model" in files else ""
    require(name in files, f"{folder / name} is missing{hint}")
    try:
        if name == "tokenizer.json":
            prefix = saved["model"].get("continuing_subword_prefix") or ""  # the library 0.23 aborts the process where one is missing
            if not all((pair.split(" ") if isinstance(pair, str) else pair)[1].startswith(prefix) for pair in prefix and saved["model"]["merges"]):
                raise ValueError("a merge lacks the prefix that it says it has")
            library = tokenizers.Tokenizer.from_str(files[name].decode("utf-8-sig"))
        else:
            kind = config.get("tokenizer_class")
            require(kind in (None, "GPT2Tokenizer", "GPT2TokenizerFast"),
                    f"{folder / 'tokenizer.json'} is missing, and {one_line(kind)} is not read from vocab.json")
            vocab, lines = read_json(folder, files, "vocab.json"), files[name].decode("utf-8-sig").split("\n")
            merges = [tuple(line.split()) for n, line in enumerate(lines) if line.strip() and not (n == 0 and line.startswith("#version"))]
            library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
            library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
            library.decoder = tokenizers.decoders.ByteLevel()
        library.no_truncation()
        library.no_padding()
        if listed := config.get("added_tokens_decoder"):
            listed = sorted((int(i), entry["content"], entry) for i, entry in listed.items())
        else:
            listed = [(i, word, {"special": word in special}) for word, i in read_json(folder, files, "added_tokens.json").items()]
        known = {token.content for token in library.get_added_tokens_decoder().values()}
        for i, word, entry in sorted(listed, key=lambda item: item[0]):
            if word not in known:
                flags = {key: entry[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in entry}
                library.add_tokens([tokenizers.AddedToken(word, **{"normalized": False} | flags)])
                known.add(word)
                require(library.token_to_id(word) == i, f"{folder}: the added token {word} can't have the id {i}, which its configuration gives it")
        library.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in special
                                    if word not in known and library.token_to_id(word) is not None])
    except UserError:
        raise
    except Exception as error:  # whatever the library raises
        raise UserError(f"{folder / name} or an added token is damaged ({one_line(error)})") from None
    return library


def content_of(token):
    """The text of a token as configurations give it, a string or an object with content; None for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


# ---------------------------------------------------------------------------------------------------------
# Dialogues. Our template: <|system|>text <|user|>text <|assistant|>reply<|endoftext|> <|user|>... (no spaces between)

def encode_prompt(tokenizer, messages):
    """Ids of a conversation that awaits the assistant. messages: [{role, content}]."""
    if tokenizer.roles:
        return encode_dialogue(tokenizer, messages)[0] + [tokenizer.roles["assistant"]]
    messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
    return tokenizer.encode_pieces(tokenizer.template.prompt_pieces(messages), hidden)[0]


def encode_dialogue(tokenizer, messages, last_only=False):
    """Ids of a whole conversation, and a mask that is True on what the assistant says, end tokens included.

    last_only: True on the assistant's last turn alone. The ids begin with encode_prompt of the messages before that turn. Where
    a chat template writes earlier turns anew as the conversation goes on, the mask is that of last_only.
    """
    if tokenizer.roles:
        ids, mask = [], []
        for message in messages:
            answer = message["role"] == "assistant"
            content = tokenizer.encode(message["content"], "special") + [tokenizer.eos] * answer
            ids += [tokenizer.roles[message["role"]], *content]
            mask += [False, *[answer] * len(content)]
    else:
        messages, hidden = tokenizer.template.hide(messages, tokenizer.special)
        ids, mask = tokenizer.encode_pieces(tokenizer.template.dialogue_pieces(messages), hidden)
    if last_only and True in mask:
        start = len(mask) - mask[::-1].index(True)  # behind the last reply
        while start and mask[start - 1]:
            start -= 1
        mask = [m and i >= start for i, m in enumerate(mask)]
    return ids, mask


def encode_text(tokenizer, text):
    """Ids of plain text between document tokens, and a mask that is True on all but the first."""
    ids = [tokenizer.document, *tokenizer.encode(text, "special"), tokenizer.document]
    return ids, [False] + [True] * (len(ids) - 1)


def describe(tokenizer, ids, mask):
    """One example as text, the part that mask selects set in [[ ]]."""
    text = ""
    for inside, run in groupby(zip(ids, mask), key=lambda pair: pair[1]):
        shown = tokenizer.show(*(i for i, _ in run))
        text += f"[[{shown}]]" if inside else shown
    return text
