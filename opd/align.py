"""The bytes behind token ids, and which tokens of two tokenizers cover the same bytes of a response.

For responses whose ids do not all map one to one (`opd.vocab.TokenMap`): the response's text is tokenised by the
teacher, and a student position is scored only where a teacher token begins and ends at the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from os.path import commonprefix
from typing import Any

from opd.vocab import ordinary_tokens

_SENTENCEPIECE_STEPS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes | None]:
    """What each id below vocab_size stands for in running text; None for control and unknown tokens and ids without one.

    tokenizer is a transformers tokenizer whose tokenizers-library backend says in its decoder how tokens are spelled:
    `ByteLevel` (GPT-2, Qwen), or sentencepiece's (`▁` for a space, and with `ByteFallback` `<0xAB>` for a byte). A
    `▁` that only marks the start of a text is a space here too; `align_response` knows. Tokens added to a byte-level
    vocabulary are their literal UTF-8 bytes, which the backend's own decode gets wrong for `straße`.
    Raises ValueError for other tokenizers (WordPiece: it does not keep the spaces of a text).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    config = {} if backend is None else json.loads(backend.to_str())
    spelling = _spelling(config, type(tokenizer).__name__)
    model, added = config["model"], tokenizer.added_tokens_decoder
    unknown = {model.get("unk_id"), tokenizer.get_vocab().get(model.get("unk_token"))} - {None}
    literal = set(added) if spelling is _byte_level else set()
    tokens: list[bytes | None] = [None] * vocab_size
    for token, index in ordinary_tokens(tokenizer, vocab_size, unknown).items():
        tokens[index] = token.encode() if index in literal else spelling(token)
    return tokens


def response_text(tokens: list[bytes]) -> str:
    """The text of a response's tokens, up to the first byte that is not valid UTF-8.

    So a response that its length limit cuts inside a character loses that character alone.
    """
    spelled = b"".join(tokens)
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode()


def align_response(student_tokens: list[bytes], teacher_tokens: list[bytes]) -> list[int]:
    """For each student token the index of the teacher token that covers exactly the same bytes, else -1.

    The lists are the bytes of a response's tokens in both tokenizers; give a token without any (EOS) as b"". Offsets
    count the bytes from the response's start, and are compared up to the first byte where the two texts differ (a
    character cut by the length limit, a teacher's normaliser); tokens that reach beyond it do not align. Nor do empty
    tokens. Indices that are not -1 increase.

    Where one side begins with one space more than the other (the dummy prefix that sentencepiece adds), that space is
    left out: b" seven" and b"seven" at the start count as the same range, a token that is that space alone as empty.
    """
    student, teacher = b"".join(student_tokens), b"".join(teacher_tokens)
    extra = _leading_spaces(student) - _leading_spaces(teacher)
    student_skip, teacher_skip = int(extra == 1), int(extra == -1)
    agreed = len(commonprefix([student[student_skip:], teacher[teacher_skip:]]))
    index_of = {span: index for index, span in enumerate(_spans(teacher_tokens, teacher_skip)) if span[0] < span[1]}
    spans = _spans(student_tokens, student_skip)
    return [index_of.get(span, -1) if span[1] <= agreed else -1 for span in spans]


def _spans(tokens: list[bytes], skip: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each token in bytes, the first `skip` bytes of the text left out."""
    return pairwise(max(0, end - skip) for end in accumulate(map(len, tokens), initial=0))


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


def _spelling(config: dict[str, Any], class_name: str) -> Callable[[str], bytes]:
    """How a token's string becomes bytes, read from the decoder of a backend's configuration."""
    decoder, model = config.get("decoder") or {"type": "no decoder"}, config.get("model", {})
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if kinds == ["ByteLevel"] and not affixes:
        return _byte_level
    replaced = [
        (step.get("replacement") or step["pattern"].get("String"), step.get("content", " "))
        for step in steps
        if step["type"] in ("Metaspace", "Replace")
    ]
    if not kinds or not set(kinds) <= _SENTENCEPIECE_STEPS or affixes or any(old is None for old, _ in replaced):
        found = " + ".join([*kinds, *affixes])
        raise ValueError(
            f"cannot tell which bytes the tokens of a {class_name} stand for: the decoder of its tokenizer.json must be "
            f"ByteLevel or sentencepiece's (Metaspace, or Replace and ByteFallback), and here it is {found}; choose a "
            "model with byte-level BPE or a sentencepiece vocabulary (WordPiece does not keep the spaces of a text)"
        )

    def sentencepiece(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return sentencepiece


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that Latin-1 prints are themselves, the others follow in order from U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """Characters of the byte alphabet as their bytes; a token with any other character is literal."""
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()
