"""English sentences of our own writing: a small lexicon and a grammar in which each word depends on those before it.

Verbs agree with a subject that may stand far back, pronouns with whom they mean, tenses across clauses, nouns with the
number before them; some words sound alike (`their` and `there`, `for` and `four`). Lists, counting and repeated words
tempt a decoder into loops. All text is lower case without punctuation, with numbers written out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

__all__ = ["PARTS", "Draw", "part_of", "sentence", "sentences", "with_word_errors"]

MIN_WORDS, MAX_WORDS = 8, 20
# Share of all sentences that belongs to each part. A text is in one part only, whatever the seed.
PARTS = {"training": 0.45, "unlabelled": 0.45, "evaluation": 0.10}

T = TypeVar("T")


class Draw:
    """Choices that are the same in every Python version: of `random.Random` only `random()` is promised to be."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def below(self, limit: int) -> int:
        return int(self._generator.random() * limit)

    def one_of(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self._generator.random() < probability


# -- lexicon -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pronouns:
    """What refers back to a noun phrase."""

    subject: str
    object: str
    possessive: str


HE, SHE = Pronouns("he", "him", "his"), Pronouns("she", "her", "her")
IT, THEY = Pronouns("it", "it", "its"), Pronouns("they", "them", "their")


@dataclass(frozen=True)
class Noun:
    singular: str
    plural: str
    pronouns: Pronouns = IT


@dataclass(frozen=True)
class Verb:
    base: str
    third: str
    past: str
    ing: str = ""

    def finite(self, tense: str, plural: bool) -> str:
        if tense == "past":
            return self.past
        return self.base if plural else self.third


NAMES = {"anna": SHE, "maria": SHE, "lucy": SHE, "peter": HE, "oscar": HE, "thomas": HE}
PEOPLE = (
    *(Noun("farmer", "farmers", HE), Noun("sailor", "sailors", HE), Noun("man", "men", HE)),
    *(Noun("teacher", "teachers", SHE), Noun("girl", "girls", SHE), Noun("woman", "women", SHE)),
)
ANIMALS = (Noun("bird", "birds"), Noun("dog", "dogs"), Noun("horse", "horses"), Noun("sheep", "sheep"))
THINGS = (
    *(Noun("boat", "boats"), Noun("house", "houses"), Noun("letter", "letters"), Noun("apple", "apples")),
    *(Noun("book", "books"), Noun("box", "boxes"), Noun("stone", "stones")),
)
INSIDE = ("garden", "school", "market")
OUTSIDE = ("river", "bridge")
ACTIONS = (
    *(Verb("wait", "waits", "waited", "waiting"), Verb("sing", "sings", "sang", "singing")),
    *(Verb("sleep", "sleeps", "slept", "sleeping"), Verb("work", "works", "worked", "working")),
    Verb("run", "runs", "ran", "running"),
)
DEEDS = (
    *(Verb("see", "sees", "saw"), Verb("find", "finds", "found"), Verb("carry", "carries", "carried")),
    *(Verb("want", "wants", "wanted"), Verb("like", "likes", "liked")),
)
THOUGHTS = (Verb("say", "says", "said"), Verb("know", "knows", "knew"), Verb("think", "thinks", "thought"))
OF_THINGS = ("red", "blue", "green", "white", "heavy", "empty")
OF_THE_LIVING = ("old", "new", "small", "quiet")
UNITS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
TEENS = ("ten", "eleven", "twelve")
TENS = ("twenty", "thirty", "forty", "fifty")
DAYS = ("monday", "friday", "sunday")


# -- phrases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NounPhrase:
    words: str
    plural: bool
    pronouns: Pronouns
    alive: bool = True

    def again(self, draw: Draw) -> NounPhrase:
        """What a later clause calls it: mostly the pronoun."""
        return replace(self, words=self.pronouns.subject) if draw.chance(0.7) else self


def number(draw: Draw) -> str:
    """A number above one, in words."""
    kind = draw.below(10)
    if kind < 4:
        return draw.one_of(UNITS)
    if kind < 5:
        return draw.one_of(TEENS)
    below_hundred = f"{draw.one_of(TENS)} {draw.one_of(UNITS)}"
    return below_hundred if kind < 9 else f"{draw.one_of(('one', *UNITS))} hundred and {below_hundred}"


def noun_phrase(
    draw: Draw, nouns: Sequence[Noun], *, plural: bool | None = None, definite: bool | None = None
) -> NounPhrase:
    """A determiner or number, perhaps an adjective, and the noun in the form that they ask for."""
    noun = draw.one_of(nouns)
    plural = draw.chance(0.5) if plural is None else plural
    definite = draw.chance(0.55) if definite is None else definite
    adjective = f"{draw.one_of(OF_THINGS if noun in THINGS else OF_THE_LIVING)} " if draw.chance(0.4) else ""
    described = adjective + (noun.plural if plural else noun.singular)
    if definite:
        determiner = draw.one_of(("the", "these", "those", "both") if plural else ("the", "this", "that", "every"))
    elif plural:
        determiner = number(draw) if draw.chance(0.8) else "many"
    else:
        determiner = draw.one_of(("one", "an" if described[0] in "aeiou" else "a"))
    return NounPhrase(f"{determiner} {described}", plural, THEY if plural else noun.pronouns, noun not in THINGS)


def someone(draw: Draw) -> NounPhrase:
    """A name, or people."""
    if draw.chance(0.5):
        name = draw.one_of(tuple(NAMES))
        return NounPhrase(name, False, NAMES[name])
    return noun_phrase(draw, PEOPLE)


def living(draw: Draw) -> NounPhrase:
    return someone(draw) if draw.chance(0.6) else noun_phrase(draw, ANIMALS)


def goods(draw: Draw, owner: NounPhrase) -> str:
    """Things as an object; some belong to `owner`."""
    if draw.chance(0.35):
        noun = draw.one_of(THINGS)
        return f"{owner.pronouns.possessive} {draw.one_of(OF_THINGS)} {draw.one_of((noun.singular, noun.plural))}"
    return noun_phrase(draw, THINGS).words


def place(draw: Draw) -> str:
    if draw.chance(0.4):
        return f"in the {draw.one_of(INSIDE)}"
    return f"{draw.one_of(('near', 'behind', 'under'))} the {draw.one_of(OUTSIDE)}"


def time(draw: Draw) -> str:
    day = f"on {draw.one_of(DAYS)} {draw.one_of(('morning', 'night'))}"
    hour = draw.one_of((*UNITS, *TEENS))
    clock = f"at {draw.one_of(('half past', 'quarter to', 'quarter past', 'ten past', 'twenty to'))} {hour}"
    return draw.one_of((day, clock, f"{clock} {day}"))


def be(tense: str, plural: bool) -> str:
    if tense == "past":
        return "were" if plural else "was"
    return "are" if plural else "is"


def far_subject(draw: Draw, tense: str) -> NounPhrase:
    """A subject with nouns of the other number between it and its verb."""
    if draw.chance(0.5):
        head = noun_phrase(draw, PEOPLE)
        inner = f"who {draw.one_of(DEEDS).finite(tense, head.plural)} {noun_phrase(draw, THINGS, plural=not head.plural).words}"
    else:
        head = noun_phrase(draw, (*ANIMALS, *THINGS))
        inner = f"{draw.one_of(('near', 'behind', 'under'))} {noun_phrase(draw, THINGS, plural=not head.plural).words}"
    return replace(head, words=f"{head.words} {inner}")


def predicate(draw: Draw, subject: NounPhrase, tense: str, *, negatable: bool = True) -> str:
    """Verb and what follows it, in agreement with the subject."""
    plural, kind = subject.plural, draw.below(6 if subject.alive else 2)
    action, negation = draw.one_of(ACTIONS), " not" if negatable and draw.chance(0.5) else ""
    if kind == 0:
        quality = draw.one_of(OF_THE_LIVING if subject.alive else OF_THINGS)
        return f"{be(tense, plural)}{negation or ' very' * draw.below(4)} {quality}"
    if kind == 1:
        return f"{be(tense, plural)}{negation}{f' {action.ing}' * subject.alive} {place(draw)}"
    if kind == 2:
        return f"{action.finite(tense, plural)} {draw.one_of(('there', 'here', 'again', 'very often'))}"
    if kind == 3 and negatable:
        auxiliary = "did" if tense == "past" else "do" if plural else "does"
        return f"{auxiliary} not {action.base} {place(draw)}"
    deed = draw.one_of(DEEDS).finite(tense, plural)
    return f"{deed} {living(draw).words if draw.chance(0.3) else goods(draw, subject)}"


def clause(draw: Draw, subject: NounPhrase, tense: str) -> str:
    return f"{subject.words} {predicate(draw, subject, tense)}"


# -- sentences ---------------------------------------------------------------------------------------------------------


def plain(draw: Draw, tense: str) -> str:
    return clause(draw, far_subject(draw, tense), tense)


def two_clauses(draw: Draw, tense: str) -> str:
    """The second clause speaks of the subject of the first, in the same tense."""
    subject = living(draw)
    link = draw.one_of(("when", "because", "while", "before", "after", "if"))
    first, second = clause(draw, subject, tense), clause(draw, subject.again(draw), tense)
    return f"{link} {first} {second}" if draw.chance(0.5) else f"{first} {link} {second}"


def report(draw: Draw, tense: str) -> str:
    speaker = someone(draw)
    verb = draw.one_of(THOUGHTS).finite(tense, speaker.plural)
    return (
        f"{speaker.words} {verb} that {clause(draw, speaker.again(draw) if draw.chance(0.6) else living(draw), tense)}"
    )


def counted(draw: Draw, tense: str) -> str:
    """There is one, there are many: the verb agrees with what comes after it."""
    first, second = (noun_phrase(draw, (*ANIMALS, *THINGS), definite=False) for _ in range(2))
    opening = f"there {be(tense, first.plural)} {first.words} {place(draw)}"
    return f"{opening} and {second.words} {be(tense, second.plural)} {place(draw)}"


def shopping(draw: Draw, tense: str) -> str:
    owner = someone(draw)
    items = [goods(draw, owner) for _ in range(3 + draw.below(2))]
    return f"{owner.words} {draw.one_of(DEEDS).finite(tense, owner.plural)} {' and '.join(items)}"


def counting(draw: Draw, tense: str) -> str:
    """One dog two dogs three dogs: each number is the one after the last."""
    noun, first = draw.one_of((*ANIMALS, *THINGS)), draw.below(4)
    numbers = ("one", *UNITS)[first : first + 3 + draw.below(2)]
    counts = [f"{n} {noun.singular if n == 'one' else noun.plural}" for n in numbers]
    speaker = someone(draw)
    verb = Verb("count", "counts", "counted").finite(tense, speaker.plural)
    return f"{speaker.words} {verb} {' '.join(counts[:-1])} and {counts[-1]}"


def over_and_over(draw: Draw, tense: str) -> str:
    """Repeated words, and an end that has to be found after them."""
    subject = living(draw)
    verb = draw.one_of(ACTIONS).finite(tense, subject.plural)
    repeated = draw.one_of(
        (
            " and ".join([verb] * (2 + draw.below(3))),
            f"{verb} again" + " and again" * (1 + draw.below(3)),
            f"{verb} over and over again",
        )
    )
    return f"{subject.words} {repeated} {draw.one_of(('until', 'because'))} {clause(draw, subject.again(draw), tense)}"


def neither_nor(draw: Draw, tense: str) -> str:
    """The verb agrees with the nearer subject."""
    first, second = living(draw), living(draw)
    opening, link = draw.one_of((("neither", "nor"), ("either", "or")))
    return f"{opening} {first.words} {link} {second.words} {predicate(draw, second, tense, negatable=False)}"


def question(draw: Draw, tense: str) -> str:
    subject = living(draw)
    if draw.chance(0.5):
        company = f"{subject.words} and {subject.pronouns.possessive} {draw.one_of(ANIMALS).plural}"
        subject = replace(subject, words=company, plural=True, pronouns=THEY)
    auxiliary = "did" if tense == "past" else "do" if subject.plural else "does"
    return f"{auxiliary} {subject.words} {draw.one_of(DEEDS).base} {goods(draw, subject)}"


FRAMES: tuple[Callable[[Draw, str], str], ...] = (
    *(plain, plain, two_clauses, two_clauses, report, report),
    *(counted, shopping, counting, over_and_over, neither_nor, question),
)


def sentence(draw: Draw) -> str:
    """One sentence of MIN_WORDS to MAX_WORDS words."""
    while True:
        frame, tense = draw.one_of(FRAMES), draw.one_of(("present", "past"))
        text = frame(draw, tense)
        if frame is not counting and draw.chance(0.3):
            text = f"{time(draw)} {text}" if draw.chance(0.3) and frame is not question else f"{text} {time(draw)}"
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text


def part_of(text: str) -> str:
    """The name in PARTS of the part that a sentence belongs to: a hash of its words decides."""
    position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
    for part, share in PARTS.items():
        position -= share
        if position < 0:
            return part
    return part


def sentences(part: str, num_sentences: int, seed: int) -> list[str]:
    """`num_sentences` different sentences of one part, the same for the same arguments on every machine."""
    draw = Draw(seed)
    texts: dict[str, None] = {}
    while len(texts) < num_sentences:
        text = sentence(draw)
        if part_of(text) == part:
            texts[text] = None
    return list(texts)


def with_word_errors(text: str, rate: float, draw: Draw) -> str:
    """A careless reference: each word is replaced, left out or followed by a stray one, with probability `rate` in all.

    Stray words are drawn as often as sentences use them. At least one word is left.
    """
    words: list[str] = []
    for word in text.split():
        kind = draw.one_of(("substitution", "deletion", "insertion")) if draw.chance(rate) else "none"
        if kind in ("none", "insertion"):
            words.append(word)
        if kind in ("substitution", "insertion"):
            words.append(draw.one_of([stray for stray in sentence(draw).split() if stray != word]))
    return " ".join(words) or text
