# ruff: noqa: SIM905 - lists of words read best as text
"""Haystacks for models that read prose: sentences of our own, put together from a seed, or those of the user's texts.

A sentence has slots; with their words no two sentences of a long prompt need be the same. None has a number in it, so
that answers are found in needles alone.
"""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from farspan.engine_ext.errors import ConfigError

SLOTS = {
    "person": """baker surveyor librarian widow ferryman clerk schoolmaster tailor gardener nurse carpenter judge
        printer shepherd pharmacist conductor glazier miller archivist captain""".split(),
    "place": """harbour valley village archive orchard station market square chapel lighthouse mill quarry courthouse
        bridge island workshop observatory cloister tavern library dockyard""".split(),
    "thing": """ledger barometer lantern map violin letter compass loom clock portrait kettle almanac telescope ladder
        saddle herbarium dictionary manuscript rowing-boat bell""".split(),
    "quality": """patient careless modest brittle generous stubborn faint sober curious weathered reluctant precise
        cheerful obscure quiet gaudy sincere ordinary unfinished remarkable""".split(),
    "time": """spring autumn winter summer harvest midsummer lent thaw drought frost""".split(),
    "idea": """memory trade justice patience distance habit ambition weather friendship solitude thrift rumour duty
        craftsmanship credit exile hospitality doubt inheritance leisure""".split(),
}
TEMPLATES = tuple(
    """
Nobody in the {place} could say why the {person} kept the {thing} behind a locked door.
It was a {quality} {time}, and the road to the {place} stayed empty until evening.
The {person} had learned early that {idea} is worth more than a {quality} {thing}.
When the {thing} was sold, the {person} did not ask for its price but for the name of the buyer.
People who write about {idea} seldom mention how {quality} the beginning usually is.
Every {time} the {person} walked to the {place} and counted the windows that were still lit.
What looks like {idea} from a distance often turns out to be {quality} {idea} when somebody asks twice.
The {thing} stood in the corner of the {place}, and visitors took it for a gift of the {person}.
A {quality} argument broke out between the {person} and the {person} about the repair of the {thing}.
In the old reports the {place} is described as {quality}, though hardly any of the authors had been there.
She answered that {idea} had never built a {place}, and that a {thing} would not feed anybody in {time}.
The best advice the {person} ever gave was to leave the {thing} alone until the {time} was over.
There is a kind of {idea} that only grows where a {person} and a {person} share the same {place}.
Before the {time} the {place} had been a {place}, and some of its doors still led nowhere.
He wrote three pages about the {thing} and crossed out all but one {quality} sentence.
Most of what we call {idea} is a {quality} sort of waiting, and the {person} was good at it.
The rain came from the side of the {place}, and the {thing} had to be carried indoors by two people.
If the {person} was disappointed, the neighbours at the {place} saw nothing of it.
A {thing} can be mended by anyone; a {quality} reputation takes the whole of a {time}.
They agreed on the colour of the {thing} and on nothing else until the {time}.
From the tower of the {place} one sees the road, the fields, and a {quality} stretch of water.
The {person} of the {place} believed in {idea} and slept badly all the same.
For a while the {thing} was thought to be lost, and then a {person} brought it back without a word.
The lesson is not that {idea} fails, but that it needs a {quality} {person} to look after it.
Long after the {place} was closed, letters to the {person} still arrived there in {time}.
An apprentice once asked what the {thing} was for, and the {person} took the whole {time} to answer.
The story of the {quality} {person} is told in the {place} whenever the talk turns to {idea}.
Whoever inherits a {thing} inherits a {quality} opinion about {idea} with it.
On market days the {person} set the {thing} on the wall of the {place} and let people guess its age.
It takes a {quality} eye to tell {idea} from {idea} in the dim light of a {place}.
The council wanted a new {place}; the {person} wanted the old {thing} to be wound once a week.
Under the {thing} lay a note about {idea}, unsigned, in a {quality} hand.
""".strip().splitlines()
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
MIN_WORDS = 4
"""Pieces of a text with fewer words are headings, numbers or lists."""


def own_sentences(rng: random.Random) -> Iterator[str]:
    """Sentences without end."""
    while True:
        template = TEMPLATES[int(rng.random() * len(TEMPLATES))]
        yield re.sub(r"\{(\w+)\}", lambda slot: rng.choice(SLOTS[slot[1]]), template)


def text_sentences(sentences: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The sentences of a text in their order, from one that the seed draws on; from the start again after the end."""
    first = int(rng.random() * len(sentences))
    while True:
        yield from sentences[first:]
        first = 0


def read_sentences(paths: Sequence[Path]) -> list[str]:
    """The sentences of text files. Raises ConfigError for a file that cannot be read as text, or without sentences."""
    sentences = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"haystack={str(path)!r} cannot be read ({error}); name text files in UTF-8") from error
        pieces = (" ".join(piece.split()) for piece in SENTENCE_END.split(text))
        found = [piece for piece in pieces if len(piece.split()) >= MIN_WORDS]
        if not found:
            raise ConfigError(f"haystack={str(path)!r} has no sentence of {MIN_WORDS} words; name files with prose")
        sentences += found
    return sentences
