"""The needle model's tokenizer: one token per known word, single characters for everything else.

Case, accents and white space are lost; characters other than ASCII letters, digits and punctuation become `<unk>`.
"""

import json
import string
from pathlib import Path

from .words import ADJECTIVES, FILLER_KINDS, NOUNS, ORDINALS, PUNCTUATION, TEMPLATE_WORDS, VALUES

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS)
CONTINUATION = "##"  # marks a piece glued to the one before it, as in WordPiece
VOCAB_MULTIPLE = 64
MAX_LENGTH = 131072
LONGEST_WORD = 32


def vocabulary() -> dict[str, int]:
    """Token -> id: special tokens, punctuation, characters, then the words by kind; padded to a multiple of 64."""
    characters = string.ascii_lowercase + string.digits
    filler_words = [word for words in FILLER_KINDS.values() for word in words]
    tokens = dict.fromkeys(
        [
            *SPECIAL_TOKENS,
            *PUNCTUATION,
            *characters,
            *(CONTINUATION + character for character in characters),
            *TEMPLATE_WORDS,
            *ADJECTIVES,
            *NOUNS,
            *ORDINALS,
            *VALUES,
            *filler_words,
        ]
    )
    num_unused = -len(tokens) % VOCAB_MULTIPLE
    tokens.update(dict.fromkeys(f"<unused{index}>" for index in range(num_unused)))
    return {token: token_id for token_id, token in enumerate(tokens)}


def build_tokenizer():
    """The `tokenizers.Tokenizer`; encoding puts BOS in front."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=UNK, continuing_subword_prefix=CONTINUATION))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    # Characters that the vocabulary lacks are isolated, so that they do not turn their whole word into <unk>. Long runs
    # are cut, because WordPiece takes time in the square of a word's length and gives up at 100 characters.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Split(Regex(r"[^\x21-\x7e]+"), "isolated"),
            pre_tokenizers.Split(Regex(rf"[\x21-\x7e]{{{LONGEST_WORD}}}"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION, cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
