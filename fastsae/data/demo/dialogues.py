"""Turn the installed documentation into chat dialogues: deterministic, and each stretch of text used only once.

An entry of the corpus becomes a list of turns (what it does, its signature, its arguments, what it returns, its errors,
an example, further details). Turns are grouped into dialogues of one to four; the second and later turns are phrased
as follow-ups. A turn that repeats 20 words in a row of an earlier turn is left out at once, so that the 20-gram
deduplication of the training pipeline finds next to nothing to drop.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fastsae.data.demo import templates
from fastsae.data.demo.docstrings import is_prose
from fastsae.data.demo.sources import Entry

Message = dict[str, str]
Dialogue = list[Message]

SEED = 20
NGRAM = 20
_MAX_TURNS = 4
_PRIME = (1 << 61) - 1
_BASE = 1_000_003


@dataclass(frozen=True)
class Turn:
    """A question in two phrasings, as the first of a dialogue and as a follow-up, and its answer.

    The follow-up of an overview names its subject, that of any other turn relies on the turn before.
    """

    first: str
    follow: str
    answer: str
    is_overview: bool = False


class SeenWindows:
    """Remembers every window of `n` whitespace-separated words; exact, independent of Python's hash seed.

    Words are numbered in order of appearance and windows hashed as polynomials modulo 2**61 - 1.
    """

    def __init__(self, n: int = NGRAM) -> None:
        self.n = n
        self._ids: dict[str, int] = {}
        self._seen: set[int] = set()
        self._power = pow(_BASE, n, _PRIME)

    def windows(self, text: str) -> list[int]:
        """Hashes of all windows of one text; empty when it has fewer than `n` words."""
        ids = self._ids
        numbers = [ids.setdefault(word, len(ids) + 1) for word in text.split()]
        value, found = 0, []
        for i, number in enumerate(numbers):
            value = (value * _BASE + number) % _PRIME
            if i >= self.n:
                value = (value - numbers[i - self.n] * self._power) % _PRIME
            if i >= self.n - 1:
                found.append(value)
        return found

    def add_if_new(self, *texts: str) -> bool:
        """Add the windows of all texts and return True, or change nothing and return False if one is known."""
        found = {window for text in texts for window in self.windows(text)}
        if not found.isdisjoint(self._seen):
            return False
        self._seen |= found
        return True


def make_dialogues(entries: Iterable[Entry], seed: int = SEED) -> list[Dialogue]:
    """All dialogues of the entries in a shuffled order that depends on the entries and the seed alone."""
    rng = random.Random(seed)
    seen = SeenWindows()
    dialogues: list[Dialogue] = []
    pending: list[tuple[Entry, Turn]] = []  # turns of short entries of one module, to be asked about together
    for entry in entries:
        turns = [turn for turn in entry_turns(entry, rng) if seen.add_if_new(turn.first, turn.answer)]
        full = len(pending) + len(turns) > _MAX_TURNS or sum(len(turn.answer.split()) for _, turn in pending) > 50
        if pending and (full or pending[0][0].module != entry.module):
            dialogues.append(_sibling_dialogue(pending, rng))
            pending = []
        if len(turns) <= 2 and sum(len(turn.answer.split()) for turn in turns) < 25:
            pending += [(entry, turn) for turn in turns]
        else:
            dialogues += _grouped(turns, rng)
    if pending:
        dialogues.append(_sibling_dialogue(pending, rng))
    rng.shuffle(dialogues)
    return dialogues


def entry_turns(entry: Entry, rng: random.Random) -> Iterator[Turn]:
    """The turns that one entry gives, in a natural order; every sentence of its documentation occurs at most once."""
    chunks = list(_chunks(entry.sentences, rng))
    if chunks:
        yield _overview(entry, chunks[0], rng)
    if entry.signature and (len(entry.signature) > 12 or not chunks) and rng.random() < 0.45:
        name = entry.name.rpartition(".")[2]
        yield _turn(entry, rng, templates.SIGNATURE, name + entry.signature)
    yield from _argument_turns(entry, rng)
    if entry.returns:
        yield _turn(entry, rng, templates.RETURNS, _small_start(_trim(entry.returns, 100)))
    yield from _error_turns(entry, rng)
    for example in entry.examples[:3]:
        code = "\n".join(example.splitlines()[:14])
        yield _turn(entry, rng, templates.EXAMPLE, code)
    for chunk in chunks[1:]:
        yield _turn(entry, rng, templates.MORE, chunk)
    if len(entry.members) > 2:
        names = _enumerate([f"`{m}`" for m in entry.members[:12]], len(entry.members) - 12)
        yield _turn(entry, rng, templates.MEMBERS[entry.kind], names)
    if entry.bases and rng.random() < 0.4:
        bases = _enumerate([f"`{b}`" for b in entry.bases], 0)
        yield _turn(entry, rng, templates.BASES, bases)


def _turn(entry: Entry, rng: random.Random, phrases: templates.Phrases, text: str, **more: str) -> Turn:
    fields = _fields(entry) | more
    return Turn(
        first=rng.choice(phrases.first).format(**fields),
        follow=rng.choice(phrases.follow).format(**fields),
        answer=rng.choice(phrases.answer).format(t=text, **fields),
    )


def _fields(entry: Entry) -> dict[str, str]:
    full = entry.full_name
    package = entry.module.partition(".")[0]
    return {
        "n": full,
        "m": entry.module,
        "s": entry.name or entry.module,
        "k": entry.kind,
        "p": {"torch": "PyTorch", "numpy": "NumPy"}.get(package, "the standard library"),
    }


def _overview(entry: Entry, text: str, rng: random.Random) -> Turn:
    if entry.kind != "module" and rng.random() < 0.12:  # the description is the question, the name the answer
        fields = _fields(entry)
        question = rng.choice(templates.WHICH).format(t=_trim(text, 45), **fields)
        return Turn(question, question, rng.choice(templates.WHICH_ANSWER).format(**fields), is_overview=True)
    answers = [a for a in templates.OVERVIEW_ANSWER if entry.kind != "module" or "{m}" not in a]
    phrases = templates.Phrases(templates.OVERVIEW[entry.kind], templates.SIBLING_FOLLOW, answers)
    turn = _turn(entry, rng, phrases, text)
    return replace(turn, is_overview=True)


def _argument_turns(entry: Entry, rng: random.Random) -> Iterator[Turn]:
    """One turn for several short descriptions together, one each for a long one."""
    short: list[str] = []
    for name, kind, text in entry.arguments:
        described = f"{text}" if not kind else f"({kind}) {text}"
        if len(text.split()) >= 22:
            yield _turn(entry, rng, templates.ARGUMENT, _trim(described, 110), a=name)
        else:
            short.append(f"- `{name}`: {described}")
    for start in range(0, len(short), 6):
        text = "\n".join(short[start : start + 6])
        yield _turn(entry, rng, templates.MORE_ARGUMENTS if start else templates.ARGUMENTS, text)


def _error_turns(entry: Entry, rng: random.Random) -> Iterator[Turn]:
    if entry.errors:
        text = " ".join(
            f"It raises `{name}`: {when}" if when else f"It can raise `{name}`." for name, when in entry.errors
        )
        yield _turn(entry, rng, templates.DOCUMENTED_ERRORS, _trim(text, 90))
        return
    messages = [(name, text) for name, text in entry.raised if 2 < len(text.split()) < 40 and is_prose(text, 0.75)]
    if messages and rng.random() < 0.35:
        name, text = messages[0]
        fields = _fields(entry) | {"t": text, "x": name}
        question = rng.choice(templates.MESSAGE).format(**fields)
        yield Turn(question, question, rng.choice(templates.MESSAGE_ANSWER).format(**fields))
    elif entry.raised and rng.random() < 0.6:
        parts = [f'{name} with the message "{text}"' if is_prose(text) else name for name, text in entry.raised]
        yield _turn(entry, rng, templates.ERRORS, _enumerate(parts, 0))


def _grouped(turns: list[Turn], rng: random.Random) -> Iterator[Dialogue]:
    """Cut the turns of one entry into dialogues of one to four turns."""
    position = 0
    while position < len(turns):
        size = rng.choices((1, 2, 3, 4), weights=(30, 32, 22, 16))[0]
        group = turns[position : position + size]
        position += size
        if sum(len(turn.answer.split()) + len(turn.first.split()) for turn in group) < 12 and len(turns) > len(group):
            continue  # a lone signature or base class that was cut off from its entry
        yield _dialogue([(t.first if i == 0 else t.follow, t.answer) for i, t in enumerate(group)], rng)


def _sibling_dialogue(pending: list[tuple[Entry, Turn]], rng: random.Random) -> Dialogue:
    """One dialogue that asks about several shortly documented names of a module in turn."""
    pairs: list[tuple[str, str]] = []
    previous = None
    for entry, turn in pending:
        as_follow_up = previous is not None if turn.is_overview else previous is entry
        pairs.append((turn.follow if as_follow_up else turn.first, turn.answer))
        previous = entry
    return _dialogue(pairs, rng)


def _dialogue(pairs: Iterable[tuple[str, str]], rng: random.Random) -> Dialogue:
    messages: Dialogue = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(templates.SYSTEM)})
    for i, (question, answer) in enumerate(pairs):
        opener = rng.choice(templates.OPENERS) if i == 0 else ""
        messages.append({"role": "user", "content": opener + question})
        messages.append({"role": "assistant", "content": answer[:1].upper() + answer[1:]})
    return messages


def _chunks(sentences: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Consecutive sentences joined up to a random length of 20 to 110 words; overlong sentences are left out."""
    limit = rng.randint(20, 100)
    chunk: list[str] = []
    words = 0
    for sentence in sentences:
        count = len(sentence.split())
        if count > 110:
            continue
        if chunk and words + count > limit:
            yield _join(chunk)
            chunk, words, limit = [], 0, rng.randint(25, 110)
        chunk.append(sentence)
        words += count
    if chunk:
        yield _join(chunk)


def _join(sentences: Sequence[str]) -> str:
    """Sentences to one text: items of a list on lines of their own, a full stop where one is missing."""
    text, after_item = "", False
    for sentence in sentences:
        is_item = sentence.startswith("- ")
        text += "\n" if is_item or after_item else " "
        text += sentence if sentence[-1] in ".!?:;,)`" else sentence + "."
        after_item = is_item
    return text.strip()


def _trim(text: str, limit: int) -> str:
    """At most `limit` words, cut at the end of a sentence where there is one."""
    words = text.split(" ")
    if len(words) <= limit:
        return text
    cut = " ".join(words[:limit])
    end = max(cut.rfind(". "), cut.rfind("; "))
    return cut[: end + 1] if end > len(cut) // 3 else cut + " ..."


def _small_start(text: str) -> str:
    """The text as the end of a sentence: "The mean" becomes "the mean"; names keep their capitals."""
    word = text.split(" ", 1)[0]
    return (
        text[0].lower() + text[1:] if word in {"The", "A", "An", "Either", "Whether", "List", "Array", "This"} else text
    )


def _enumerate(parts: Sequence[str], others: int) -> str:
    """ "a, b and c", or "a, b, c and 4 others"."""
    items = [*parts, f"{others} others" if others > 1 else "another one"] if others > 0 else list(parts)
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def entry_text(entry: Entry) -> str:
    """The documentation of one entry as plain text: heading, running text, arguments, result, errors, examples."""
    parts = [f"{entry.full_name}{entry.signature}"]
    if entry.sentences:
        parts.append(_join(entry.sentences))
    if entry.arguments:
        parts.append(
            "Arguments:\n" + "\n".join(f"  {n} ({t}): {d}" if t else f"  {n}: {d}" for n, t, d in entry.arguments)
        )
    if entry.returns:
        parts.append(f"Returns:\n  {entry.returns}")
    if entry.errors:
        parts.append("Raises:\n" + "\n".join(f"  {name}: {when}" for name, when in entry.errors))
    parts += entry.examples
    return "\n\n".join(parts)
