"""Training batches of the needle model, made on the training device with a few vectorised operations.

A row is BOS, a context of filler with needles at random places, and a block of questions about them, each answered.
Every answer is supervised: with dozens of bindings and questions in a row (multi-query associative recall,
arXiv 2312.04927) the model finds out to bind keys instead of learning which values exist.
"""

import random
from dataclasses import dataclass

import torch
from farspan.needle.tasks import NUM_GROUPS, NUM_HOPS, NUM_MULTI, filler_words
from farspan.needle.tokenizer import BOS, EOS, PAD, UNK, vocabulary
from farspan.needle.words import ADJECTIVES, NOUNS, ORDINALS, VALUES

NUM_FILLER_TOKENS = 2_000_000
NOISE_SHARE = 0.15  # of rows
SIDES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # how many words of each kind make the keys of a row
STRIDES = (10007, 10009, 10037, 10039, 10061, 10067, 10069, 10079)  # primes above the most keys of a row

# Loss weights of tokens.
IGNORED, FILLER, ANSWER = 0, 1, 2


@dataclass
class Batch:
    """Rows of one length; the first `num_repeat_rows` are repetitions, the others end in questions.

    tokens, kinds, positions: [rows, length] int64; `kinds[:, i]` says how the prediction of `tokens[:, i]` counts.
    """

    tokens: torch.Tensor
    kinds: torch.Tensor
    positions: torch.Tensor
    num_repeat_rows: int


class BatchMaker:
    """Draws batches; shapes come from a Python generator, contents from one on the device, both seeded."""

    def __init__(self, seed: int, device: torch.device, max_position: int, num_filler_tokens: int = NUM_FILLER_TOKENS):
        """Build the id tables and the pool of filler text."""
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device
        self.max_position = max_position
        vocab = vocabulary()
        self.vocab_size = len(vocab)
        self.vocab = vocab
        self.adjectives, self.nouns, self.values, self.ordinals = (
            torch.tensor([vocab[word] for word in words], device=device)
            for words in (ADJECTIVES, NOUNS, VALUES, ORDINALS)
        )
        self.group_of_token = torch.full((len(vocab),), -1, device=device)
        for table in (self.adjectives, self.nouns, self.values):
            self.group_of_token[table] = torch.arange(len(table), device=device) % NUM_GROUPS
        key_words = {*ADJECTIVES, *NOUNS, *VALUES, *ORDINALS, PAD, UNK, BOS, EOS}
        noise = [token_id for token, token_id in vocab.items() if token not in key_words]
        self.noise = torch.tensor(noise, device=device)
        filler = [vocab[word] for sentence in filler_words(self.rng, num_filler_tokens) for word in sentence]
        self.filler = torch.tensor(filler, device=device)

    def make(self, num_rows: int, length: int, mix: dict[str, float], spread: bool) -> Batch:
        """A batch of `num_rows` rows of `length` tokens.

        mix: share of rows by kind ("repeat", which comes first, "keys", "values", "trace").
        spread: half of the rows get gaps in their positions, so that short rows reach as far as 128K ones.
        """
        counts = _split(num_rows, mix, self.rng)
        parts = [getattr(self, f"_{kind}")(count, length) for kind, count in counts.items() if count]
        tokens, kinds = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return Batch(tokens, kinds, self._positions(num_rows, length, spread), counts.get("repeat", 0))

    def places(self, count: int, length: int) -> torch.Tensor:
        """`count` random places of a row."""
        return self._randint(0, length, (count,))

    def _repeat(self, rows: int, length: int):
        """Random tokens, then the same again until the end; the repetition is supervised."""
        period = self._randint(min(8, length // 4), length // 2 + 1, (rows, 1))
        base = self._randint(4, self.vocab_size, (rows, length))
        place = torch.arange(length, device=self.device).expand(rows, -1)
        tokens = base.gather(1, place % period)
        group = self.group_of_token[tokens]
        held_out = (group == group.roll(1, dims=1)) & (group >= 0)
        tokens = tokens.masked_fill(held_out, self.vocab[","])
        tokens[:, 0] = self.vocab[BOS]
        kinds = torch.where((place > period + 1) & (place % period != 0), ANSWER, IGNORED)
        return tokens, kinds

    def _keys(self, rows: int, length: int):
        """Notes under two-word keys; questions list one to eight keys."""
        num_asked = self.rng.choice((1, 1, 2, 4, 4, 8) if length > 64 else (1, 2, 4))
        question_len = 5 + 5 * num_asked
        num_questions, context_len = self._plan(length, question_len)
        num_needles = self._count(context_len // 6, minimum=2)
        adjective, noun = self._keys_of_rows(rows, num_needles)
        first, second = self.adjectives[adjective], self.nouns[noun]
        value = self.values[self._other_group_value(noun)]
        needles = self._join(rows, num_needles, "note", ":", first, second, value, ".")
        which, fresh = self._ask(rows, num_needles, num_questions * num_asked)
        key = torch.stack((first.gather(1, which), second.gather(1, which)), dim=-1)
        listed = key.view(rows, num_questions, 2 * num_asked)
        answered = torch.cat((key, value.gather(1, which)[..., None]), dim=-1).view(rows, num_questions, 3 * num_asked)
        fresh = fresh.view(num_questions, num_asked).repeat_interleave(3, dim=1)
        return self._assemble(length, needles, ["question", ":"], listed, answered, fresh)

    def _values(self, rows: int, length: int):
        """Several values of one noun under ordinals; a question asks for all of them in order."""
        question_len = 7 + 3 * NUM_MULTI
        num_questions, context_len = self._plan(length, question_len)
        num_names = min(self._count(context_len // (6 * NUM_MULTI), minimum=1), len(NOUNS) // 2)
        name_index, value_index = self._bound_values(rows, num_names, NUM_MULTI)
        name = self.nouns[name_index][..., None].expand(-1, -1, NUM_MULTI)
        ordinal = self.ordinals[:NUM_MULTI].expand(rows, num_names, -1)
        value = self.values[value_index]
        flat = (rows, num_names * NUM_MULTI)
        columns = (name.reshape(flat), ordinal.reshape(flat), value.reshape(flat))
        needles = self._join(*flat, "note", ":", *columns, ".")
        which, fresh = self._ask(rows, num_names, num_questions)
        listed = self.nouns[name_index].gather(1, which)[..., None]
        triple = torch.stack((name, ordinal, value), dim=-1).view(rows, num_names, 3 * NUM_MULTI)
        answered = triple.gather(1, which[..., None].expand(-1, -1, 3 * NUM_MULTI))
        fresh = fresh[:, None].expand(-1, 3 * NUM_MULTI)
        return self._assemble(length, needles, ["question", ":", "all"], listed, answered, fresh)

    def _trace(self, rows: int, length: int):
        """Chains of variables that end in a value; a question asks for the whole chain."""
        question_len = 7 + 3 * NUM_HOPS
        num_questions, context_len = self._plan(length, question_len)
        num_chains = min(self._count(context_len // (4 * NUM_HOPS), minimum=1), len(NOUNS) // NUM_HOPS)
        index = self._shuffled_nouns(rows).view(rows, -1, NUM_HOPS)[:, :num_chains]
        value_index = self._other_group_value(index[..., -1])
        names = self.nouns[index]
        ends = torch.cat((names[..., 1:], self.values[value_index][..., None]), dim=-1)
        flat = (rows, num_chains * NUM_HOPS)
        needles = self._join(*flat, "set", names.reshape(flat), ends.reshape(flat), ".")
        which, fresh = self._ask(rows, num_chains, num_questions)
        listed = names[..., 0].gather(1, which)[..., None]
        words = torch.full_like(names, self.vocab["set"])
        triple = torch.stack((words, names, ends), dim=-1).view(rows, num_chains, 3 * NUM_HOPS)
        answered = triple.gather(1, which[..., None].expand(-1, -1, 3 * NUM_HOPS))
        fresh = fresh[:, None].expand(-1, 3 * NUM_HOPS)
        return self._assemble(length, needles, ["question", ":", "trace"], listed, answered, fresh)

    def _assemble(self, length: int, needles, opening: list[str], listed, answered, fresh):
        """Put a row together: BOS, filler with needles, then questions `opening listed answer : answered EOS`.

        needles: [rows, num_needles, words]; listed, answered: [rows, num_questions, words];
        fresh: [num_questions, words of an answer], whether nothing before gives it away. -> tokens, kinds.
        """
        rows, num_questions, _ = listed.shape
        fixed = [self._constant(rows, num_questions, *words) for words in (opening, ["answer", ":"], [EOS])]
        questions = torch.cat((fixed[0], listed, fixed[1], answered, fixed[2]), dim=-1)
        is_answer = torch.zeros(questions.shape[1:], dtype=torch.bool, device=self.device)
        is_answer[:, -answered.shape[-1] - 1 : -1] = fresh
        is_answer[:, -1] = True
        questions = questions.flatten(1)
        context_len = length - 1 - questions.shape[1]
        context, is_filler = self._context(rows, context_len, needles)
        bos = torch.full((rows, 1), self.vocab[BOS], device=self.device)
        tokens = torch.cat((bos, context, questions), dim=1)
        question_kinds = torch.where(is_answer.flatten(), ANSWER, IGNORED).expand(rows, -1)
        kinds = torch.cat((torch.zeros_like(bos), torch.where(is_filler, FILLER, IGNORED), question_kinds), dim=1)
        return tokens, kinds

    def _context(self, rows: int, context_len: int, needles):
        """Filler with the needles at random places in random order -> tokens, is_filler: [rows, context_len].

        Some rows have random pieces and words for filler, so that needles are found in any text.
        """
        _, num_needles, needle_len = needles.shape
        start = self._randint(0, len(self.filler) - context_len, (rows, 1))
        context = self.filler[start + torch.arange(context_len, device=self.device)]
        is_noisy = self._random(rows, 1) < NOISE_SHARE
        noise = self.noise[self._randint(0, len(self.noise), (rows, context_len))]
        context = torch.where(is_noisy, noise, context)
        order = self._random(rows, num_needles).argsort(dim=1)
        needles = needles.gather(1, order[..., None].expand_as(needles))
        slack = context_len - num_needles * needle_len
        place = self._randint(0, slack + 1, (rows, num_needles)).sort(dim=1).values
        place = place + torch.arange(num_needles, device=self.device) * needle_len
        place = (place[..., None] + torch.arange(needle_len, device=self.device)).flatten(1)
        context = context.scatter(1, place, needles.flatten(1))
        is_filler = (~is_noisy).repeat(1, context_len).scatter_(1, place, False)
        return context, is_filler

    def _keys_of_rows(self, rows: int, num_needles: int):
        """Adjective and noun indices of distinct trainable keys, [rows, num_needles]; few words make keys share one."""
        sides = [side for side in SIDES if side * side >= num_needles]
        side = self.rng.choice(sides[:6])
        # Adjectives and nouns of a row come from complementary halves of the groups: no pair within one group.
        halves = self._random(rows, NUM_GROUPS).argsort(dim=1)
        adjective = self._words_of_groups(halves[:, : NUM_GROUPS // 2], len(ADJECTIVES), side)
        noun = self._words_of_groups(halves[:, NUM_GROUPS // 2 :], len(NOUNS), side)
        stride = torch.tensor(STRIDES, device=self.device)[self._randint(0, len(STRIDES), (rows, 1))]
        start = self._randint(0, side * side, (rows, 1))
        pair = (start + torch.arange(num_needles, device=self.device) * stride) % (side * side)
        return adjective.gather(1, pair // side), noun.gather(1, pair % side)

    def _words_of_groups(self, groups, num_words: int, side: int):
        """`side` distinct word indices per row, all from the row's groups [rows, 4]."""
        rows, num_groups = groups.shape
        per_group = num_words // NUM_GROUPS
        index = groups[..., None] + NUM_GROUPS * torch.arange(per_group, device=self.device)
        order = self._random(rows, num_groups * per_group).argsort(dim=1)[:, :side]
        return index.flatten(1).gather(1, order)

    def _bound_values(self, rows: int, num_names: int, num_values: int):
        """Distinct noun indices [rows, names] and value indices [rows, names, values] of other groups."""
        name = self._random(rows, len(NOUNS)).argsort(dim=1)[:, :num_names]
        return name, self._other_group_value(name[..., None].expand(-1, -1, num_values))

    def _other_group_value(self, noun_index):
        shift = self._randint(1, NUM_GROUPS, noun_index.shape)
        group = (noun_index + shift) % NUM_GROUPS
        return group + NUM_GROUPS * self._randint(0, len(VALUES) // NUM_GROUPS, noun_index.shape)

    def _shuffled_nouns(self, rows: int):
        """All nouns in an order where neighbours are of different groups: groups cycle, members shuffle."""
        per_group = len(NOUNS) // NUM_GROUPS
        member = self._random(rows, NUM_GROUPS, per_group).argsort(dim=2)
        group = self._random(rows, NUM_GROUPS).argsort(dim=1)[..., None]
        member = member.gather(1, group.expand_as(member))
        return (group + NUM_GROUPS * member).transpose(1, 2).reshape(rows, -1)

    def _ask(self, rows: int, num_bindings: int, num_questions: int):
        """Which binding each question asks for [rows, num_questions]; whether for the first time [num_questions]."""
        repeats = -(-num_questions // num_bindings)
        order = self._random(rows, repeats, num_bindings).argsort(dim=2).flatten(1)[:, :num_questions]
        return order, torch.arange(num_questions, device=self.device) < num_bindings

    def _plan(self, length: int, question_len: int) -> tuple[int, int]:
        """Number of questions and context length of a row."""
        if length <= 256:
            share = 0.5
        elif length <= 2048:
            share = 0.3
        else:
            share = 0.12
        num_questions = max(1, int((length - 1) * share * self.rng.uniform(0.7, 1.0)) // question_len)
        return num_questions, length - 1 - num_questions * question_len

    def _count(self, most: int, minimum: int) -> int:
        """Number of needles, log-uniform in [minimum, most], often the most."""
        most = min(most, SIDES[-1] ** 2)
        if self.rng.random() < 0.25:
            return most
        return max(minimum, min(most, int(minimum * (most / minimum) ** self.rng.random())))

    def _positions(self, rows: int, length: int, spread: bool):
        positions = torch.arange(length, device=self.device).expand(rows, -1)
        if not spread or length >= self.max_position:
            return positions
        num_gaps = 4
        total = (self.max_position - length) * self._random(rows, 1) * (self._random(rows, 1) < 0.5)
        share = self._random(rows, num_gaps)
        jump = (total * share / share.sum(dim=1, keepdim=True)).long()
        place = self._randint(1, int(length * 0.85), (rows, num_gaps))
        gaps = torch.zeros(rows, length, dtype=torch.long, device=self.device).scatter_add_(1, place, jump)
        return positions + gaps.cumsum(dim=1)

    def _join(self, rows: int, count: int, *columns):
        """Words and [rows, count] tensors side by side -> [rows, count, columns]."""
        return torch.stack(
            [
                torch.full((rows, count), self.vocab[column], device=self.device) if isinstance(column, str) else column
                for column in columns
            ],
            dim=-1,
        )

    def _constant(self, rows: int, count: int, *words: str):
        return torch.tensor([self.vocab[word] for word in words], device=self.device).expand(rows, count, -1)

    def _randint(self, low: int, high: int, size):
        return torch.randint(low, high, size, generator=self.generator, device=self.device)

    def _random(self, *size: int):
        return torch.rand(size, generator=self.generator, device=self.device)


def _split(num_rows: int, mix: dict[str, float], rng: random.Random) -> dict[str, int]:
    """Rows by kind; what rounding leaves over goes to kinds drawn by share."""
    counts = {kind: int(num_rows * share) for kind, share in mix.items()}
    for kind in rng.choices(list(mix), weights=list(mix.values()), k=num_rows - sum(counts.values())):
        counts[kind] += 1
    return counts
