"""Other projects' tokenizers, through the `tokenizers` library.

Text never becomes a control token here either.
"""
import re
from pathlib import Path
from typing import NamedTuple

from formats.chat_template import ChatTemplate, either, find_template, optional, own_template
from formats.errors import json_object, one_line
from formats.tokenizer import CONTROLS, ROLES, Tokenizer, json_bytes, save_files
from plumbing.disk import TOKENIZER_FILES
from plumbing.flags import UserError, require


# ---------------------------------------------------------------------------------------------------------
# Other folders' tokenizers

FILE_LIMIT = 64 << 20  # bytes

# The special tokens that configurations call by a name, and where they list those without one.
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
UNNAMED = ("additional_special_tokens", "extra_special_tokens")

# What a tokenizer's files say of an added token, beside its text.
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def open_tokenizer(folder):
    """The tokenizer of a checkpoint folder, ours or another's.

    UserError names the file that is missing or damaged.
    """
    folder = Path(folder)
    files = read_files(folder)
    saved = read_json(folder, files, "tokenizer.json")
    config = read_json(folder, files, "tokenizer_config.json")
    try:
        ours = Tokenizer.from_files(saved, config)
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer.json'} is damaged ({one_line(error)})") from None
    return ours or FolderTokenizer(folder, files, saved)


def read_files(folder):
    """{name: bytes} of the files of a folder that say something about its tokenizer."""
    files = {}
    for name in (*TOKENIZER_FILES, "config.json"):
        path = folder / name
        if path.is_file():
            require(path.stat().st_size <= FILE_LIMIT, f"{path} is too large for a tokenizer's file")
            files[name] = path.read_bytes()
    return files


def read_json(folder, files, name):
    """The JSON object in a folder's file, {} where there is none; UserError if it is damaged."""
    return json_object(files.get(name, b"{}"), folder / name, "utf-8-sig")


class Settings(NamedTuple):
    """What a folder's files say about its tokenizer."""
    config: dict  # tokenizer_config.json
    names: dict  # special_tokens_map.json
    generation: dict  # generation_config.json
    model: dict  # config.json
    words: dict  # {name: text} of the special tokens that have a name, such as eos_token


def read_settings(folder, files):
    config = read_json(folder, files, "tokenizer_config.json")
    names = read_json(folder, files, "special_tokens_map.json")
    generation = read_json(folder, files, "generation_config.json")
    model = read_json(folder, files, "config.json")
    words = {}
    for name in NAMED:
        word = content_of(config.get(name)) or content_of(names.get(name))
        if word:
            words[name] = word
    return Settings(config, names, generation, model, words)


def unnamed_words(given):
    """The texts of the special tokens that settings list without a name."""
    words = []
    for source in (given.config, given.names):
        for key in UNNAMED:
            listed = source.get(key)
            if isinstance(listed, list):
                words += map(content_of, listed)
    return [word for word in words if word]


def content_of(token):
    """The text of a token as configurations give it, a string or an object with content; else None."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def valid_ids(values, size):
    """The token ids from 0 to size - 1 in values, each as configurations have it: none, one or a list."""
    ids = []
    for value in values:
        if not isinstance(value, list):
            value = [value]
        for i in value:
            if type(i) is int and 0 <= i < size:
                ids.append(i)
    return ids


class FolderTokenizer:
    """Another project's tokenizer; its dialogues follow its folder's chat template.

    Attributes as Tokenizer's. Where the folder has no chat template, ours is used and the control tokens that
    it lacks are added at the end (`added`); with one, roles is None. files: {name: bytes} for `save`, amended
    by what was added.
    """

    def __init__(self, folder, files, saved):
        self.folder, self.name = folder, folder.name
        given = read_settings(folder, files)
        special = [*given.words.values(), *unnamed_words(given)]
        self.engine = load_library(folder, files, saved, given.config, special)
        # Ids run from 0 to n_vocab - 1. size is their number before any is added here.
        size = max(self.engine.get_vocab().values(), default=-1) + 1
        self.n_vocab = size

        eos = self._named_id("eos_token", given)
        bos = self._named_id("bos_token", given)
        endings = self._ending_ids(eos, files, given)
        self._make_special(map(self.engine.id_to_token, endings))
        if bos is not None:
            self._make_special([self.engine.id_to_token(bos)])

        source = find_template(folder, files, given.config)
        ours = source is None
        if source is not None and eos is not None:
            ours = source == own_template(self.engine.id_to_token(eos))
        self.template = None
        if not ours:
            self.template = ChatTemplate(folder, source, given.words, self.specials)
            eos = self.specials.get(self.template.ending, eos)
        require(eos is not None,
                f"{folder} names no token that ends a reply (eos_token in tokenizer_config.json)")
        self.eos = eos
        self.stops = tuple(dict.fromkeys([eos, *endings]))
        around_documents = eos if bos is None else bos
        self.document = self.specials.get("<|endoftext|>", around_documents)

        pad = self._choose_pad(bos, given.words.get("unk_token"))
        self._make_special([pad])
        self.roles = None
        if ours:
            self._make_special(CONTROLS[2:])
            self.roles = {role: self.specials[f"<|{role}|>"] for role in ROLES}
        self.pad = self.specials[pad]
        self.added = self.n_vocab - size
        self._learn_spaces()
        self.files = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
        self._amend(saved, given)

    def _named_id(self, name, given):
        """The id of a special token by its text or, failing that, by its number; None if it has neither."""
        by_text = self.engine.token_to_id(given.words.get(name, ""))
        numbers = [given.generation.get(name + "_id"), given.model.get(name + "_id")]
        ids = valid_ids([by_text, *numbers], self.n_vocab)
        return ids[0] if ids else None

    def _ending_ids(self, eos, files, given):
        """The ids of the tokens that end a reply.

        config.json counts only where there is no generation_config.json.
        """
        numbers = [given.generation.get("eos_token_id")]
        if "generation_config.json" not in files:
            numbers.append(given.model.get("eos_token_id"))
        return valid_ids([eos, *numbers], self.n_vocab)

    def _choose_pad(self, bos, unknown):
        """The text of the token that fills: one that the folder has for that or for nothing else; or our own.

        It must never be one that ends a reply: transformers finds a sequence's last token by != pad.
        unknown: the text of the token for unknown characters, or None.
        """
        free = [word for word, i in self.specials.items() if i not in (*self.stops, bos)]
        pads = [word for word in free if "pad" in word.lower()]
        if unknown in free:
            pads.append(unknown)
        unused = free
        if self.template:
            written = self.template.source + self.template.sample
            unused = [word for word in free if word not in written]
        # The token that stands around documents comes last.
        pads += sorted(unused, key=lambda word: self.specials[word] == self.document)
        return pads[0] if pads else CONTROLS[1]

    def _make_special(self, words):
        """Have words as special tokens, new ones at the end.

        UserError if the library gives them other ids.
        """
        tokens = {token.content: token for token in self.engine.get_added_tokens_decoder().values()}
        for word in words:
            if word in tokens and tokens[word].special:
                continue
            known = self.engine.token_to_id(word)
            token = optional("tokenizers").AddedToken(word, special=True, normalized=False)
            self.engine.add_special_tokens([token])
            i = self.engine.token_to_id(word)
            expected = self.n_vocab if known is None else known
            require(i == expected,
                    f"{self.folder}: its tokenizer has gaps in its ids, so {word} can't be added")
            self.n_vocab = max(self.n_vocab, i + 1)
        self.specials = {}
        for i, token in sorted(self.engine.get_added_tokens_decoder().items()):
            if token.special:
                self.specials[token.content] = i

    def _learn_spaces(self):
        """Find out where the library puts a space before text, and which special tokens may come of text.

        leaky: finds the special tokens that the model makes of their own text; special: finds all of them.
        """
        # By side: the tokens that swallow the spaces there.
        self.eaten = {"lstrip": set(), "rstrip": set()}
        for token in self.engine.get_added_tokens_decoder().values():
            for side, words in self.eaten.items():
                if getattr(token, side):
                    words.add(token.content)
        after_special = self._raw(self.engine.id_to_token(self.eos) + "a")[1:]
        # From here on the text of a special token is ordinary text.
        self.engine.encode_special_tokens = True
        plain = self._raw("a")
        self.newline = self._raw("\n")
        # What stands before a text: whether the library then begins the text with a space.
        self.spaced = {
            "start": False,
            "special": after_special != plain,
            "text": self._raw("\na") != self.newline + plain,
        }
        leaky = [word for word, i in self.specials.items() if i in self._raw(word)]
        self.leaky = re.compile(f"({either(leaky)})")
        self.special = re.compile(f"({either(self.specials)})")

    def _raw(self, text):
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode(self, text, after="start"):
        """Text to ids; special tokens in the text are encoded as the characters they are.

        after: what stands before the text ("start", "text" or "special"), as some tokenizers put a space
        before some texts.
        """
        # Lone halves of a character become the replacement character, as in tiktoken.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.leaky.search(text):
            return self._encode_spelled(text, after)
        return self._spaced(text, after)

    def _encode_spelled(self, text, after):
        """As `encode`, but special tokens go letter by letter, so that the model can't put them together."""
        ids = []
        for i, part in enumerate(self.leaky.split(text)):
            # `split` gives ordinary text and special tokens by turns.
            pieces = [part]
            is_special = i % 2 == 1
            if is_special:
                pieces = list(part)
            for piece in pieces:
                if piece:
                    ids += self._spaced(piece, after)
                    after = "text"
        return ids

    def _spaced(self, text, after):
        """The ids of a text without the space that the library may put before it.

        Behind a line break it puts none, so the text is encoded there and the line break's ids are cut off.
        """
        if self.spaced[after]:
            ids = self._raw("\n" + text)
            if ids[:len(self.newline)] == self.newline:
                return ids[len(self.newline):]
        return self._raw(text)

    def decode(self, ids):
        """Ids to text, without special tokens and ids that don't exist."""
        known = [i for i in ids if 0 <= i < self.n_vocab]
        return self.engine.decode(known, skip_special_tokens=True)

    def show(self, *ids):
        """Ids as readable text, special tokens included."""
        if not all(0 <= i < self.n_vocab for i in ids):
            shown = ""
            for i in ids:
                shown += self.show(i) if 0 <= i < self.n_vocab else f"<id {i}>"
            return shown
        # A space before the first word would be lost at the start of a text. So the ids are decoded twice
        # over, and the second half is taken.
        once = self.engine.decode(ids, skip_special_tokens=False)
        twice = self.engine.decode(ids * 2, skip_special_tokens=False)
        return twice[len(once):]

    def same_as(self, other):
        """Whether other gives the same ids for the same text and dialogue."""
        def known(t):
            return t.engine.to_str(), t.template and t.template.source, t.eos, t.pad, t.document, set(t.stops)
        return isinstance(other, FolderTokenizer) and known(self) == known(other)

    def save(self, folder):
        """Write the files that this was read from to a checkpoint folder, with what was added to them."""
        save_files(self, folder)

    def _amend(self, saved, given):
        """Bring the files in line with pad, stops, added tokens and our template.

        So transformers opens the same tokenizer. saved: tokenizer.json as it was read; given: what the other
        files say.
        """
        entries = {}  # {id: what is said of an added token}
        for i, token in sorted(self.engine.get_added_tokens_decoder().items()):
            entries[i] = {key: getattr(token, key) for key in ("content", *TOKEN_FLAGS)}
        if "tokenizer.json" in self.files:
            tokens = [{"id": i, **entry} for i, entry in entries.items()]
            before = sorted(saved.get("added_tokens") or [], key=lambda token: token["id"])
            if before != tokens:
                self.files["tokenizer.json"] = json_bytes(saved | {"added_tokens": tokens})

        config = given.config | self._config_changes(given.words, entries)
        if config != given.config:
            kind = "PreTrainedTokenizerFast" if "tokenizer.json" in self.files else "GPT2Tokenizer"
            self.files["tokenizer_config.json"] = json_bytes({"tokenizer_class": kind} | config)

        names = given.names | {"pad_token": self.engine.id_to_token(self.pad)}
        if "special_tokens_map.json" in self.files and names != given.names:
            self.files["special_tokens_map.json"] = json_bytes(names)

        # One end token alone is written as a number.
        endings = self.eos
        if len(self.stops) > 1:
            endings = list(self.stops)
        generation = given.generation | {"pad_token_id": self.pad, "eos_token_id": endings}
        if "generation_config.json" in self.files and generation != given.generation:
            self.files["generation_config.json"] = json_bytes(generation)

    def _config_changes(self, words, entries):
        """What tokenizer_config.json must say, as a dict.

        words: {name: text} of special tokens; entries: {id: what is said of it} of all added tokens.
        """
        changes = {"pad_token": self.engine.id_to_token(self.pad)}
        eos = self.engine.id_to_token(self.eos)
        # Where there is an added_tokens_decoder, transformers reads no other file's tokens, so all are named.
        if self.roles or self.added:
            for name in ("bos_token", "unk_token"):
                if name in words:
                    changes[name] = words[name]
            changes["eos_token"] = words.get("eos_token", eos)
            changes["added_tokens_decoder"] = {str(i): entry for i, entry in entries.items()}
        if self.roles and "chat_template.jinja" not in self.files:
            changes["chat_template"] = own_template(eos)
        return changes

    def encode_pieces(self, pieces, hidden):
        """Ids and mask, lists of one length, of rendered pieces [(text, whether it is a reply)].

        hidden: {stand-in: special token's text} of contents.
        """
        shown = str.maketrans(hidden)
        ids, mask = [], []
        before = None  # what came last: None at the start, "" for text, else the special token's text
        for text, reply in pieces:
            start = len(ids)
            parts = self.special.split(text)
            for i, part in enumerate(parts):
                # `split` gives ordinary text and special tokens by turns.
                is_special = i % 2 == 1
                if is_special:
                    ids.append(self.specials[part])
                    before = part
                    continue
                following = parts[i + 1] if i + 1 < len(parts) else None
                part = self._without_eaten_spaces(part, before, following)
                if part:
                    ids += self.encode(part.translate(shown), place_behind(before))
                    before = ""
            # Some templates end a turn with no special token.
            if reply and ids[start:][-1:] != [self.eos]:
                ids.append(self.eos)
                before = self.engine.id_to_token(self.eos)
            mask += [reply] * (len(ids) - start)
        return ids, mask

    def _without_eaten_spaces(self, text, before, following):
        """A text without the spaces that the special tokens before and behind it swallow.

        before, following: the texts of those tokens; "" or None if there is none.
        """
        if before in self.eaten["rstrip"]:
            text = text.lstrip()
        if following in self.eaten["lstrip"]:
            text = text.rstrip()
        return text


def place_behind(before):
    """What `encode` calls the place behind the start (None), a text ("") or a special token (its text)."""
    if before is None:
        return "start"
    return "special" if before else "text"


# ---------------------------------------------------------------------------------------------------------
# What the `tokenizers` library makes of a folder's files

def load_library(folder, files, saved, config, special):
    """A `tokenizers.Tokenizer` from a folder's files, with the tokens that its configuration adds.

    files: {name: bytes}; saved, config: tokenizer.json and tokenizer_config.json; special: the texts of the
    tokens to make special.
    """
    tokenizers = optional("tokenizers")
    name = "tokenizer.json"
    if name not in files and "vocab.json" in files:
        name = "merges.txt"
    hint = ""
    if "tokenizer.model" in files:
        hint = "; open and save the tokenizer with transformers once to make it"
    require(name in files, f"{folder / name} is missing{hint}")
    try:
        if name == "tokenizer.json":
            check_merges(saved["model"])
            library = tokenizers.Tokenizer.from_str(files[name].decode("utf-8-sig"))
        else:
            library = byte_level(folder, files, config)
        library.no_truncation()
        library.no_padding()
        add_tokens(library, folder, listed_tokens(folder, files, config, special))
        make_special(library, special)
    except UserError:
        raise
    # The library may raise anything.
    except Exception as error:
        raise UserError(f"{folder / name} or an added token is damaged ({one_line(error)})") from None
    return library


def check_merges(model):
    """ValueError where a merge lacks its prefix: at that the library, in version 0.23, aborts the process.

    model: the part of tokenizer.json of that name.
    """
    prefix = model.get("continuing_subword_prefix") or ""
    if not prefix:
        return
    for pair in model["merges"]:
        if isinstance(pair, str):
            pair = pair.split(" ")
        if not pair[1].startswith(prefix):
            raise ValueError("a merge lacks the prefix that it says it has")


def byte_level(folder, files, config):
    """A `tokenizers.Tokenizer` as GPT-2's, from vocab.json and merges.txt."""
    tokenizers = optional("tokenizers")
    kind = config.get("tokenizer_class")
    require(kind in (None, "GPT2Tokenizer", "GPT2TokenizerFast"),
            f"{folder / 'tokenizer.json'} is missing, and {one_line(kind)} is not read from vocab.json")
    vocab = read_json(folder, files, "vocab.json")
    lines = files["merges.txt"].decode("utf-8-sig").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    merges = [tuple(line.split()) for line in lines if line.strip()]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    prefix_space = config.get("add_prefix_space") is True
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    library.decoder = tokenizers.decoders.ByteLevel()
    return library


def listed_tokens(folder, files, config, special):
    """[(id, text, flags)] of the tokens that a folder's configuration adds, in the order of their ids."""
    listed = []
    if decoder := config.get("added_tokens_decoder"):
        for i, entry in decoder.items():
            flags = {key: entry[key] for key in TOKEN_FLAGS if key in entry}
            listed.append((int(i), entry["content"], flags))
    else:
        for word, i in read_json(folder, files, "added_tokens.json").items():
            listed.append((i, word, {"special": word in special}))
    return sorted(listed, key=lambda item: item[:2])


def add_tokens(library, folder, listed):
    """Add the tokens [(id, text, flags)] that the library lacks.

    UserError if one gets another id than it should.
    """
    tokenizers = optional("tokenizers")
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    for i, word, flags in listed:
        if word in known:
            continue
        library.add_tokens([tokenizers.AddedToken(word, **{"normalized": False} | flags)])
        known.add(word)
        require(library.token_to_id(word) == i,
                f"{folder}: the added token {word} can't have the id {i}, "
                "which its configuration gives it")


def make_special(library, special):
    """Make special tokens of those words that the library has as ordinary ones."""
    tokenizers = optional("tokenizers")
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    tokens = []
    for word in special:
        if word not in known and library.token_to_id(word) is not None:
            tokens.append(tokenizers.AddedToken(word, special=True, normalized=False))
    library.add_special_tokens(tokens)
