"""Files of rows, mixtures and parts of files, and data sets of the hub, as rows of one type."""
import bisect
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from formats.errors import one_line
from formats.rows import (
    FORMATS, NEEDED, PROMPTS, RATINGS, REPLIES, TURNS, WORKED, BadRow, advice, as_number, expand, merge,
    parse, recognise, translate)
from plumbing.disk import how_to_make
from plumbing.flags import UserError, parse_sources, require


# ---------------------------------------------------------------------------------------------------------
# Files, mixtures of files, parts

# The most bytes or characters of one row; a longer one is a file of another kind.
LONGEST = 2**24


def unique_fields(pairs):
    """A JSON object, [(name, value)], as a dict.

    ValueError if a field comes twice, as only the last would count.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        name, _ = counts.most_common(1)[0]
        raise ValueError(f"the field {name[:40]!r} comes twice in one object")
    return row


def refuse_constant(name):
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=unique_fields, parse_constant=refuse_constant)


def guess_encoding(raw):
    """GBK or UTF-16, where bytes look like it; else ""."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    foreign = [letter.encode("gb18030") for letter in text if not letter.isascii()]
    # Chinese text is made of the 3,755 characters in daily use, which begin with bytes from B0 to D7, and of
    # punctuation from A1 to A3. What other encodings have there seldom decodes, or to rare characters.
    # Korean alone decodes to common ones, all of them up to C8.
    daily = {*range(0xA1, 0xA4), *range(0xB0, 0xD8)}
    common = [code for code in foreign if code[0] in daily and code[1] >= 0xA1]
    if len(common) > 0.9 * len(foreign) and max(common) > b"\xc9":
        return "GBK"
    return ""


def decode_text(raw, path, line=1):
    """UTF-8 bytes, which begin at a line of a file, as text, without a byte order mark."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        newlines = error.object[:error.start].count(b"\n")
        encoding = guess_encoding(raw)
        guess = f"it looks like {encoding}; " if encoding else ""
        raise UserError(f"{path}:{line + newlines} is not UTF-8 text; {guess}convert it: "
                        f"iconv -f {encoding or 'ITS_ENCODING'} -t UTF-8 FILE > NEW") from None


def decode_json(text, at, path, line, where):
    """(value, end) of the JSON value that starts at a place of a text: what it is, and where it ends.

    line: the number, in the file, of the text's first line; where: what to call the row.
    """
    try:
        value, end = DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(f"{path}:{line} is not valid JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply") from None
    require(end - at <= LONGEST, f"{where} is longer than {LONGEST >> 20} million characters")
    return value, end


def read_lines(file, path):
    """Yield (where, row) of JSON Lines, one line in memory at a time.

    In place of a row that a line doesn't hold comes a UserError.
    """
    for number in itertools.count(1):
        raw = file.readline(LONGEST + 1)
        if not raw:
            return
        where = f"{path}:{number}"
        try:
            if len(raw) > LONGEST:
                skip_line(file)
                raise UserError(f"{where} is longer than {LONGEST >> 20} MB: is there one object per line?")
            text = decode_text(raw, path, number).strip()
            if not text:
                continue
            row, end = decode_json(text, 0, path, number, where)
            require(end == len(text), f"{where} is not valid JSON: something follows the first value")
        except UserError as error:
            row = error
        yield where, row


def skip_line(file):
    """Read on to the end of a line, LONGEST bytes in memory at a time."""
    rest = file.readline(LONGEST)
    while rest and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST)


def read_array(file, path):
    """Yield (where, row) of a JSON array, decoded one by one."""
    text = decode_text(file.read(), path)
    step = re.compile(r"\s*([\[,\]])\s*")
    mark = step.match(text)
    require(mark and mark[1] == "[",
            f"{path} holds no array of rows at its top; if every line is an object, name it .jsonl")
    number = 0
    at = mark.end()
    # The array may be empty.
    mark = step.match(text, at)
    while not (mark and mark[1] == "]"):
        number += 1
        where = f"{path}, row {number}"
        row, at = decode_json(text, at, path, 1, where)
        yield where, row
        mark = step.match(text, at)
        require(mark and mark[1] != "[", f"{where} is not valid JSON: neither a comma nor ] follows it")
        at = mark.end()
    require(mark.end() == len(text), f"{path} is not valid JSON: something follows the array")


def read_document(file, path):
    """Yield (where, row) of a .txt file, which is one row of plain text."""
    text = decode_text(file.read(), path)
    yield str(path), {"text": text.replace("\r\n", "\n")}


# Columns of a csv that hold numbers (or true and false), and those that hold lists or objects, as JSON.
NUMBERS = {*RATINGS, "label", "labels", "margin", "probability"}
LISTS = {*TURNS, "completions", "ranks", "gold", "instances", "history", "reward_model"}
# Columns that hold text, or messages as JSON.
TALKS = {*PROMPTS, *REPLIES, "chosen", "rejected"}
# A first line without any of these names no columns.
COLUMNS = {*PROMPTS, *REPLIES, *TURNS, *WORKED, "input", "chosen", "rejected", "text", "human_ref_A"}


def parse_cell(name, text):
    """What a cell of a csv's column holds: text, but for the columns that are never text."""
    if name in NUMBERS:
        known = {"true": True, "false": False, "": None}
        return known.get(text.strip().lower(), as_number(text))
    if name in LISTS and not text.strip():
        return None
    is_list = name in LISTS and text.strip()[0] in "[{"
    is_talk = name in TALKS and re.match(r"\s*(\[\s*)?\{", text)
    if is_list or is_talk:
        try:
            return DECODER.decode(text)
        except (ValueError, RecursionError):
            # The text is refused where the list is used.
            return text
    return text


def read_table(file, path):
    """Yield (where, row) of a .csv or .tsv file, whose first line names the columns."""
    text = decode_text(file.read(), path).replace("\r\n", "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.find("\0")) + 1
        raise UserError(f"{path}:{line} holds a NUL character, which is no text")
    delimiter = "\t" if path.endswith(".tsv") else ","
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = None
    # The limit is the whole process's, so it is put back.
    limit = csv.field_size_limit(LONGEST)
    try:
        while True:
            where = f"{path}:{cells.line_num + 1}"
            try:
                row = next(cells, None)
            except csv.Error as error:
                open_quote = "unexpected end of data" in str(error)
                reason = "a quote that opens in this row is never closed" if open_quote else error
                raise UserError(f"{where} is not a valid row: {reason}") from None
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                check_header(header, where)
            elif len(row) != len(header):
                yield where, UserError(f"{where} has {len(row)} columns, the header has {len(header)}")
            else:
                cells_by_name = zip(header, row)
                yield where, {name: parse_cell(name, cell) for name, cell in cells_by_name if name}
    finally:
        csv.field_size_limit(limit)


def check_header(names, where):
    """UserError unless the first line of a csv names columns that are known here, each once."""
    require(COLUMNS & set(names),
            f"{where} is no header: the first line must name the columns (prompt, completion, chosen, ...), "
            f"and this one has {list_names(names)}")
    for name, n in Counter(filter(None, names)).items():
        require(n == 1, f"{where} names the column {name[:40]!r} {n} times")


def list_names(names):
    """The first eight of some names, which may be long and odd, in one line."""
    return ", ".join(repr(name[:40])[1:-1] for name in names[:8])


def read_parquet(file, path):
    """Yield (where, row) of a .parquet file, a batch in memory at a time."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow: pip install -r requirements-hf.txt") from None
    try:
        number = itertools.count(1)
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", row
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path} can't be read: {one_line(error)}") from None


def read_hub(spec):
    """Yield (where, row) of a data set on the Hugging Face hub, or in the cache of its library.

    spec: hf:org/name/config:split.
    """
    parts = re.fullmatch(r"hf:([^/:]+/[^/:]+)(?:/([^/:]+))?(?::(.+))?", spec)
    require(parts, f"{spec}: write hf:org/name, hf:org/name:split or hf:org/name/config:split")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{spec} needs datasets: pip install -r requirements-hf.txt") from None
    name, config, split = parts.groups()
    try:
        rows = datasets.load_dataset(name, config, split=split or "train")
    # Network, names, splits, formats: anything may come up.
    except Exception as error:
        raise UserError(f"{spec} can't be loaded ({type(error).__name__}: {one_line(error)})") from None
    for number, row in enumerate(rows, 1):
        yield f"{spec}, row {number}", row


# How a file's name ends, and what reads it.
READERS = {
    ".json": read_array,
    ".json.gz": read_array,
    ".jsonl": read_lines,
    ".jsonl.gz": read_lines,
    ".txt": read_document,
    ".csv": read_table,
    ".csv.gz": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
}


def files_to_name(folder):
    """What to name in place of a folder: the files in it, or one level below, that are read."""
    files = [*Path(folder).glob("*"), *Path(folder).glob("*/*")]
    found = sorted(path for path in files if path.name.endswith(tuple(READERS)))
    if not found:
        return f"it holds no file that is read ({', '.join(READERS)})"
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"name a file in it, or several with commas: {', '.join(map(str, found[:5]))}{more}"


def read_objects(path):
    """Yield (where, dict) for every row of a file or of an hf: data set.

    In place of a dict that can't be read comes a UserError, which names file and line.
    """
    if path.startswith("hf:") and not os.path.isfile(path):
        yield from read_hub(path)
        return
    require(not os.path.isdir(path), f"{path} is a folder; {files_to_name(path)}")
    require(os.path.isfile(path), f"{path}: no such file{how_to_make(path)}")
    reader = reader_of(path)
    require(reader, f"{path}: only {', '.join(READERS)} are read")
    open_file = gzip.open if path.endswith(".gz") else open
    try:
        with open_file(path, "rb") as file:
            for where, row in reader(file, path):
                if not isinstance(row, (dict, UserError)):
                    row = UserError(f"{where} is not a JSON object with named fields")
                yield where, row
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} can't be read: {error}") from None


def reader_of(path):
    """The function that reads a file, by its name; None if there is none."""
    for ending, reader in READERS.items():
        if path.endswith(ending):
            return reader
    return None


def describe_singles(rated):
    """What rows with one labelled or rated reply each are, and lack, where no prompt has two that differ."""
    good = sum(row.ranks[0] == 0 for row in rated)
    bad = sum(row.ranks[0] == 1 for row in rated)
    labelled = good + bad == len(rated)
    kind = f"with good or bad labels ({good} true, {bad} false)" if labelled else "with ratings"
    return (f"{len(rated)} single replies {kind}, and no prompt with two that are labelled or rated "
            "differently; preferences compare replies to the same prompt: give each prompt a chosen and a "
            "rejected reply, or a row for each of its replies; sft.py can train on the good ones")


def read_source(path, want, say, skip_bad=False):
    """Rows of kind want from one file or hf: data set; says what it found and dropped.

    skip_bad: up to one row in a hundred may be unreadable.
    """
    rows = []
    rated = []  # rows of one rated reply each, which are merged by prompt
    formats = Counter()
    dropped = Counter()  # {reason: how many}
    bad = []  # UserErrors
    for number, (where, found) in enumerate(read_objects(path), 1):
        form, fields = "no known format", "none"
        try:
            if isinstance(found, UserError):
                raise found
            fields = list_names(list(found)) or "none"
            filled = {name: value for name, value in found.items() if value is not None}
            for row in expand(filled, want):
                row = translate(row)
                form = recognise(row)
                require(form and want in FORMATS[form][1],
                        f"{where} doesn't hold {NEEDED[want]}; its fields are {fields}{advice(row, want)}")
                formats[form] += 1
                try:
                    parsed = parse(row, form, want)
                except BadRow as reason:
                    dropped[str(reason)] += 1
                    continue
                if is_compared(form, want):
                    rated.append(parsed)
                else:
                    rows.append(parsed)
        except (TypeError, OverflowError, UserError) as error:
            if not isinstance(error, UserError):
                error = UserError(f"{where}: {error} (read as {form}; its fields are {fields})")
            bad.append(error)
            if not skip_bad:
                raise error from None
    if bad:
        require(100 * len(bad) <= number,
                f"{path}: {len(bad)} of {number} rows can't be read, and --skip-bad leaves out one in a "
                f"hundred at most; the first is {bad[0]}")
        say(f"warning: {path}: left out {len(bad)} of {number} rows; the first is {bad[0]}")
    rows += merge(rated, want, dropped)
    names = ", ".join(formats) or "no format"
    report = f"{path}: {sum(formats.values())} rows ({names}), {len(rows)} kept as {want}"
    if rated:
        report += ", one for all replies to a prompt"
    say(report + describe_dropped(dropped))
    require(rows or not rated, f"{path} holds {describe_singles(rated)}")
    require(rows, f"{path} holds no usable row")
    for row in rows:
        row.document = path.endswith(".txt")
    return rows


def is_compared(form, want):
    """Whether rows of a format have one reply each that is compared with the others to the same prompt."""
    if form == "rated replies":
        return want in ("demonstrations", "preferences")
    return form == "labelled replies" and want == "preferences"


def describe_dropped(dropped):
    """Why rows were dropped, as the end of a sentence: the eight most frequent reasons.

    dropped: {reason: how many}.
    """
    reasons = [f"; dropped {n}: {reason}" for reason, n in dropped.most_common() if n]
    more = "; ..." if len(reasons) > 8 else ""
    return "".join(reasons[:8]) + more


def unit_hash(text, salt=""):
    """A number in [0, 1) that depends on a text alone, and looks drawn at random."""
    digest = hashlib.sha256((salt + text).encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def cut_place(text, share):
    """Where to cut a text in two, so that about this share of it comes first. What comes last is never blank.

    It is the nearest blank line, unless that changes the smaller piece by more than half; else the end of a
    line, a space, or anywhere.
    """
    end = len(text.rstrip())
    wanted = max(1, min(round(share * end), end - 1))
    for mark in ("\n\n", "\n", " "):
        last_before = text.rfind(mark, 0, wanted + len(mark))
        first_behind = text.find(mark, wanted, end)
        places = []
        for found in (last_before, first_behind):
            if found >= 0 and found + len(mark) < end:
                places.append(found + len(mark))
        place = min(places, key=lambda at: abs(at - wanted), default=0)
        if abs(place - wanted) <= min(wanted, end - wanted) / 2:
            return place
    return wanted


def piece_of(document, start, end):
    """The part of a document between two shares of its length, as a list of one row; [] if it is blank."""
    text = document.text
    piece = text[place_of(text, start):place_of(text, end)]
    if not piece.strip():
        return []
    return [replace(document, replies=[piece])]


def place_of(text, share):
    """The place in a text before which this share of it stands; 0 is the start, 1 the end."""
    if 0 < share < 1:
        return cut_place(text, share)
    return round(share) * len(text)


def split_by_prompt(rows, fraction, say=None):
    """(training, held-out) rows: a prompt is held out by its hash, so the same prompt is never on both sides.

    Of a document it is the last share of the text. say: to say it with, if nothing is held out.
    """
    train, held_out = [], []
    for row in rows:
        if row.document:
            train += piece_of(row, 0, 1 - fraction)
            held_out += piece_of(row, 1 - fraction, 1)
        elif unit_hash(row.text) < fraction:
            held_out.append(row)
        else:
            train.append(row)
    if say and fraction and train and not held_out:
        say(f"warning: --val-fraction {fraction} holds out none of these {len(rows)} rows (a hash of its "
            "prompt decides on each), so nothing is measured on held-out rows; a larger --val-fraction holds "
            "out some")
    return train, held_out


def take_part(rows, part):
    """Rows of one part of a split such as 2/4/4:1: shares of the stages, then this stage's number, from 1.

    A prompt's part goes by a hash of its own, so that every part has the same share of the prompts of
    `split_by_prompt`; a document is cut, one part behind the other.
    """
    form = re.fullmatch(r"((?:\d+\.?\d*/)*\d+\.?\d*):(\d+)", part)
    shares = [float(share) for share in form[1].split("/")] if form else []
    require(form and min(shares) > 0 and 1 <= int(form[2]) <= len(shares),
            f"--part {part}: write the shares of the stages and the number of this one, as in 2/4/4:1")
    number = int(form[2])
    # Part i goes from ends[i - 1] to ends[i].
    ends = [0.0, *itertools.accumulate(shares)]
    total = ends[-1]
    kept = []
    for row in rows:
        if row.document:
            kept += piece_of(row, ends[number - 1] / total, ends[number] / total)
            continue
        place = unit_hash(row.text, "part ") * total
        if bisect.bisect(ends[1:], place) + 1 == number:
            kept.append(row)
    return kept


def read_rows(spec, want, say=print, part="", skip_bad=False):
    """Rows of a kind from what --data names: see `parse_sources`.

    want: the kind, "demonstrations", "preferences", "labels", "scored", "steps" or "prompts"; part: see
    `take_part`; skip_bad: see `read_source`. Of a mixture come as many rows as its weights allow when no row
    is repeated.
    """
    sources = parse_sources(str(spec))
    found = []  # a list of rows for each source
    for path, _ in sources:
        rows = read_source(path, want, say, skip_bad)
        if part:
            kept = take_part(rows, part)
            say(f"{path}: {len(kept)} of {len(rows)} rows are in part {part}")
            require(kept, f"{path} has no row in part {part}")
            rows = kept
        found.append(rows)
    has_weights = sources[0][1] is not None
    if has_weights:
        found = mix(found, sources, spec, say)
    return list(itertools.chain.from_iterable(found))


def mix(found, sources, spec, say):
    """A mixture: of each source's rows as many as the weights allow, the same ones every time.

    found: a list of rows for each source; sources: [(path, weight)]. Returns lists of rows like found.
    """
    total = sum(weight for _, weight in sources)
    shares = [weight / total for _, weight in sources]
    size = min(len(rows) / share for rows, share in zip(found, shares))
    mixed, counts = [], []
    for i, (path, _) in enumerate(sources):
        rows = found[i]
        # A whole number must not be lowered by rounding.
        count = int(size * shares[i] + 1e-6)
        require(count, f"{spec}: the share of {path} is less than a row")
        drawn = np.random.default_rng(i).permutation(len(rows))[:count]
        mixed.append([rows[j] for j in sorted(drawn)])
        counts.append(f"{count} of {path}")
    say(f"mixture of {sum(map(len, mixed))} rows: {', '.join(counts)}")
    return mixed
