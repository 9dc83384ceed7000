"""Chat templates of other projects' checkpoint folders.

They are programs (Jinja) of unknown origin, so they run in a sandbox with bounds.
"""
import contextlib
import importlib
import json
import re
import signal
import threading
from pathlib import Path

from formats.errors import one_line
from plumbing.flags import UserError, require
from plumbing.run import today

TEMPLATE_LIMIT = 100_000  # characters
OUTPUT_LIMIT = 1 << 24  # characters
SECONDS = 3  # for one rendering
MEMORY = 1 << 29  # bytes that one rendering may take
PROBE = "Zq7"  # a text that no template holds, to see what one does with it


def optional(name):
    """A module that only other projects' folders need; UserError if it isn't installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this checkpoint folder's tokenizer needs the package {name}: "
                        "pip install -r requirements-hf.txt") from None


def either(words):
    """A regular expression for any of some words, longest first; it matches nothing if there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def find_template(folder, files, config):
    """A folder's chat template, or None. files: {name: bytes}; config: tokenizer_config.json, a dict."""
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8", "replace")
    else:
        template = config.get("chat_template")
        if isinstance(template, list):
            template = default_of(template)
    require(template is None or isinstance(template, str) and 0 < len(template) <= TEMPLATE_LIMIT,
            f"{folder}: its chat template is not a text of at most {TEMPLATE_LIMIT} characters, "
            "or there is none named default")
    return template


def default_of(templates):
    """The template named default in a list [{"name": str, "template": str}]; "" if there is none."""
    for entry in templates:
        if isinstance(entry, dict) and entry.get("name") == "default":
            return entry.get("template")
    return ""


def own_template(eos):
    """Our dialogue template in Jinja. eos: the text of the token that ends a reply."""
    quoted_eos = json.dumps(eos, ensure_ascii=False)
    return ("{% for message in messages %}"
            "{{ '<|' + message['role'] + '|>' + message['content'] }}"
            "{% if message['role'] == 'assistant' %}"
            "{{ " + quoted_eos + " }}"
            "{% endif %}"
            "{% endfor %}"
            "{% if add_generation_prompt %}"
            "{{ '<|assistant|>' }}"
            "{% endif %}")


@contextlib.contextmanager
def bounded(folder):
    """Bound what a template's code takes: time (in the main thread) and memory (on Linux).

    Any failure becomes a UserError.
    """
    def stop(*_):
        raise TimeoutError(f"it takes more than {SECONDS} seconds")

    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    used = Path("/proc/self/statm")
    resource = None
    if used.exists():
        resource = importlib.import_module("resource")
    try:
        if timed:
            handler = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
        if resource:
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(used.read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            if soft != resource.RLIM_INFINITY:
                limit = min(limit, soft)
            resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        yield
    except UserError:
        raise
    # Anything can come out of a template.
    except Exception as error:
        raise UserError(f"{folder}: its chat template failed: {one_line(error)}") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        if resource:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def sandbox():
    """The Jinja environment that transformers renders chat templates in.

    It is stricter about sizes and about unsafe attributes.
    """
    jinja2 = optional("jinja2")
    ext = optional("jinja2.ext")
    safe = optional("jinja2.sandbox")
    # One date for as long as a tokenizer is open: a conversation has the same ids at its end.
    date = today()

    class Generation(ext.Extension):
        """transformers' mark around replies: its body alone counts here."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Sandbox(safe.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context, operator, left, right):
            a, b = size_of(left), size_of(right)
            if operator == "**":
                too_large = max(a, b) > 1000
            else:
                most = 1 << 63 if is_number(left) and is_number(right) else 1 << 20
                too_large = a * b > most
            if too_large:
                raise safe.SecurityError(f"the result of {operator} would be too large")
            return super().call_binop(context, operator, left, right)

        def unsafe_undefined(self, obj, attribute):
            raise safe.SecurityError(f"the attribute {attribute} of {type(obj).__name__} is unsafe")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    # Jinja's own escapes HTML.
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": date.strftime}
    return environment


def is_number(value):
    return isinstance(value, (int, float))


def size_of(value):
    """How large an operand of a template is: a number's amount, or the length of a text or list."""
    return abs(value) if is_number(value) else len(value)


class ChatTemplate:
    """A folder's chat template.

    Messages are turns as `Row` has them. ending: the special token that ends a reply, or None; tail: the text
    that ends it then; sample: a rendered conversation.
    """

    def __init__(self, folder, source, words, specials):
        """source: the template's text; words: {name: text} of the special tokens that it may ask for by name,
        such as eos_token; specials: the texts of all special tokens.
        """
        self.folder, self.source, self.words = folder, source, words
        environment = sandbox()
        with bounded(folder):
            self.compiled = environment.from_string(source)
        # Whether a system message goes into the first user message.
        self.merges_system = False
        system = {"role": "system", "content": PROBE}
        user = {"role": "user", "content": PROBE}
        assistant = {"role": "assistant", "content": PROBE}
        self.sample = self.render([user, assistant], False)
        require(PROBE in self.sample, f"{folder}: its chat template leaves out what the assistant says")
        tail = self.sample[self.sample.rindex(PROBE) + len(PROBE):]
        found = re.search(either(specials), tail)
        if found:
            self.ending, self.tail = found[0], ""
        else:
            self.ending, self.tail = None, tail
        try:
            self.merges_system = self.render([system, user], True).count(PROBE) < 2
        except UserError:
            # It rejects system messages.
            self.merges_system = True

    def render(self, messages, waiting):
        """The text of a conversation; waiting: with what begins the assistant's next turn."""
        if self.merges_system:
            messages = merge_system(messages)
        # The template may change what it is given, so it is given copies.
        copies = [dict(message) for message in messages]
        pieces, size = [], 0
        with bounded(self.folder):
            rendering = self.compiled.generate(
                messages=copies, tools=None, documents=None, add_generation_prompt=waiting, **self.words)
            for piece in rendering:
                pieces.append(piece)
                size += len(piece)
                require(size <= OUTPUT_LIMIT,
                        f"{self.folder}: its chat template makes more than {OUTPUT_LIMIT} characters")
        return "".join(pieces)

    def hide(self, messages, special):
        """Messages with stand-ins for the special tokens in their contents, and {stand-in: special token}.

        special: a regular expression that finds those tokens. A stand-in is a single letter.
        """
        texts = "".join(message["content"] for message in messages)
        used = set(texts) | set(self.source)
        # Letters for private use that nobody uses here.
        free = (chr(i) for i in range(0xF0000, 0x10FFFE) if chr(i) not in used)
        stand_ins = {token: next(free) for token in sorted(set(special.findall(texts)))}
        hidden = []
        for message in messages:
            content = special.sub(lambda found: stand_ins[found[0]], message["content"])
            hidden.append(message | {"content": content})
        return hidden, {letter: token for token, letter in stand_ins.items()}

    def prompt_pieces(self, messages, waiting=True):
        """A conversation as pieces [(text, whether it is a reply)] that don't depend on what follows them.

        waiting: as for `render`. One piece alone if the template writes earlier turns otherwise than it wrote
        them when they were the last.
        """
        whole = self.render(messages, waiting)
        in_one = [(whole, False)]
        pieces = []
        done = ""  # the text of the pieces
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], True)
            after = self.render(messages[:i + 1], False)
            if not before.startswith(done) or not after.startswith(before):
                return in_one
            reply = self.cut(after[len(before):])
            pieces.append((before[len(done):], False))
            pieces.append((reply, True))
            done = before + reply
        if not whole.startswith(done):
            return in_one
        return [*pieces, (whole[len(done):], False)]

    def dialogue_pieces(self, messages):
        """A whole conversation as pieces [(text, whether it is a reply)].

        It ends with the token that ends the last reply. UserError if that reply can't be told apart.
        """
        if not messages or messages[-1]["role"] != "assistant":
            return self.prompt_pieces(messages, waiting=False)
        pieces = self.prompt_pieces(messages[:-1])
        before = "".join(text for text, _ in pieces)
        after = self.render(messages, False)
        require(after.startswith(before),
                f"{self.folder}: its chat template doesn't write a reply behind what it writes to ask for "
                f"one, which ends in {before[-40:]!r}; so the reply can't be trained on")
        reply = self.cut(after[len(before):])
        return [*pieces, (reply, True)]

    def cut(self, turn):
        """A reply's rendering up to and with its end token."""
        if self.ending and self.ending in turn:
            return turn[:turn.index(self.ending) + len(self.ending)]
        return turn.removesuffix(self.tail)


def merge_system(messages):
    """Messages with the system's, if there is one, as the start of the first user message."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, *rest = messages
    content = system["content"]
    if rest and rest[0]["role"] == "user":
        content += "\n\n" + rest[0]["content"]
        rest = rest[1:]
    return [{"role": "user", "content": content}, *rest]
