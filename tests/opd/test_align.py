"""Token bytes and alignment between real tokenizers: byte-level BPE and sentencepiece-style BPE and Unigram."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, BertTokenizerFast, PreTrainedTokenizerFast

from opd.align import align_response, response_text, token_bytes

SPECIAL = ["<s>", "<|im_end|>"]
TEXTS = [
    "seven eight  nine", " zero one", "Straße, façade và naïve", "žluťoučký kůň", "今天天气很好", "东京都の天気は晴れです",
    "カタカナとひらがな", "안녕하세요 세계", "👍🏽 ok 👩‍👩‍👧", "call 0123 456  now ", "a\nb\tc", "  two spaces", "ÅÅ ǅ ﬁ … €",
]  # fmt: skip
Tokens = list[bytes]


def byte_level(corpus: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    """GPT-2 style; with room in the vocabulary every word of the corpus becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")


def metaspace_bpe(corpus: Sequence[str], vocab_size: int = 2000, prepend: str = "first") -> PreTrainedTokenizerFast:
    """Llama's layout: `▁`, byte tokens, and a decoder that strips the one space it put before the text.

    prepend is the scheme of the Metaspace pre-tokenizer, or `normalizer`: there even a space gets one before it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size))
    model = json.loads(tokenizer.to_str())["model"]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))])}
    for token in sorted(model["vocab"], key=model["vocab"].__getitem__):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (prepend != "never"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<s>")


def metaspace_unigram(corpus: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """T5's layout: Unigram and a Metaspace decoder, no byte tokens; `<unk>` is not declared as a control token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", *SPECIAL]
    tokenizer.train_from_iterator(
        corpus, trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=special, unk_token="<unk>")
    )
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] != "<unk>"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(config)), eos_token="<|im_end|>")


byte_table = cache(token_bytes)  # per tokenizer and size


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    table = byte_table(tokenizer, len(tokenizer))
    tokens = [table[index] for index in tokenizer.encode(text, add_special_tokens=False)]
    assert None not in tokens, "the test's text has an unknown token"
    return [token for token in tokens if token is not None]


def pieces(text: str) -> Tokens:
    """Token boundaries written out: `se|ven`."""
    return [piece.encode() for piece in text.split("|")]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Runs of characters out of TEXTS, with spaces anywhere, also in a row and at both ends."""
    rng = random.Random(seed)
    alphabet = "".join(TEXTS)
    drawn = [rng.choice([rng.choice(TEXTS)[rng.randrange(4) :], rng.choice(alphabet), " "]) for _ in range(6 * count)]
    return ["".join(drawn[i : i + 6]) for i in range(0, len(drawn), 6)]


@pytest.fixture(scope="module")
def byte_level_tokenizers() -> list[PreTrainedTokenizerFast]:
    return [byte_level(TEXTS, 270), byte_level(TEXTS * 3, 400), byte_level(random_texts(50, seed=9), 900)]


@pytest.fixture(scope="module")
def sentencepiece_tokenizers() -> list[PreTrainedTokenizerFast]:
    """With a dummy prefix; the first knows few characters, so most of its tokens are bytes."""
    return [
        metaspace_bpe(["seven eight nine", "安天"], 60),
        metaspace_bpe(TEXTS, 400, prepend="always"),
        metaspace_bpe(TEXTS * 2, 300, prepend="normalizer"),
    ]


# --- token_bytes -----------------------------------------------------------------------------------------------------


def test_byte_level_tokens_are_the_bytes_of_the_text(byte_level_tokenizers: list[PreTrainedTokenizerFast]) -> None:
    rng = random.Random(1)
    for tokenizer in byte_level_tokenizers:
        table = token_bytes(tokenizer, len(tokenizer))
        for text in [*TEXTS, *random_texts(100)]:
            assert b"".join(encode(tokenizer, text)) == text.encode()
        ordinary = [index for index, token in enumerate(table) if token is not None]
        for _ in range(100):  # any ids, also those that spell no valid text
            ids = rng.choices(ordinary, k=20)
            spelled = b"".join(table[index] or b"" for index in ids)
            assert tokenizer.decode(ids) == spelled.decode(errors="replace")


def test_every_byte_has_a_token() -> None:
    tokens = token_bytes(byte_level(["a"], 258), 258)
    assert sorted(token for token in tokens if token is not None) == [bytes([byte]) for byte in range(256)]
    tokens = token_bytes(metaspace_bpe(["a"], 10), 259)
    assert tokens[3:] == [bytes([byte]) for byte in range(256)]


def test_sentencepiece_tokens_are_the_bytes_of_the_text(
    sentencepiece_tokenizers: list[PreTrainedTokenizerFast],
) -> None:
    for tokenizer in sentencepiece_tokenizers:
        for text in [*TEXTS, *random_texts(100)]:
            spelled = b"".join(encode(tokenizer, text)).decode()
            assert spelled in (text, " " + text)
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode(ids) == spelled.removeprefix(" ")
    tokenizer = metaspace_bpe(TEXTS, 400, prepend="never")
    for text in [*TEXTS, *random_texts(100)]:
        assert b"".join(encode(tokenizer, text)) == text.encode()


def test_a_string_like_a_byte_token_is_a_byte_only_with_byte_fallback() -> None:
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "<0x41>": 3, "▁a": 4, "<0x41>a": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>"))
    for decoder, expected in (
        (decoders.Metaspace(), b"<0x41>"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]), b"<0x41>"),
        (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), b"A"),
        (decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]), b"A"),
    ):
        tokenizer.decoder = decoder
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        assert token_bytes(wrapped, 6) == [None, b" ", b"a", expected, b" a", b"<0x41>a"]
    tokenizer.decoder = decoders.Metaspace(replacement="a")  # the character for a space is read, not assumed
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer), 3)[1:] == ["▁".encode(), b" "]


def test_unigram_without_byte_tokens() -> None:
    tokenizer = metaspace_unigram(TEXTS * 3, 150)
    table = token_bytes(tokenizer, len(tokenizer))
    assert table[tokenizer.convert_tokens_to_ids("<unk>")] is None  # the model's, though no control token
    assert b"".join(encode(tokenizer, "seven 안녕 kůň")) == " seven 안녕 kůň".encode()
    assert len(encode(tokenizer, "seven 안녕 kůň")) < len(" seven 안녕 kůň")


def test_control_tokens_and_ids_without_a_token_have_no_bytes() -> None:
    tokenizer = byte_level(["seven"], 270)
    tokenizer.add_tokens([AddedToken("<|audio|>", special=True)])
    size = len(tokenizer)
    table = token_bytes(tokenizer, size + 3)
    assert len(table) == size + 3
    empty = [index for index, token in enumerate(table) if token is None]
    control = tokenizer.convert_tokens_to_ids([*SPECIAL, "<|audio|>"])
    assert empty == sorted([*control, size, size + 1, size + 2])
    assert token_bytes(tokenizer, 100) == table[:100]  # a model with fewer rows than its tokenizer has tokens


def test_added_words_are_literal() -> None:
    words = ["straße", "Ġx", "two words", "天气"]
    tokenizer = byte_level(["seven"], 270)
    tokenizer.add_tokens(words)
    assert encode(tokenizer, "straßeĠxtwo words天气") == [word.encode() for word in words]
    tokenizer = metaspace_bpe(["seven"], 30)
    tokenizer.add_tokens([*words, "▁▁"])
    table = token_bytes(tokenizer, len(tokenizer))
    assert [table[index] for index in tokenizer.convert_tokens_to_ids(words)] == [word.encode() for word in words]
    assert table[tokenizer.convert_tokens_to_ids("▁▁")] == b"  "  # sentencepiece's own symbols can be listed as added


def test_a_byte_level_token_outside_the_byte_alphabet_is_literal() -> None:
    tokenizer = Tokenizer(models.BPE({"Ġa": 0, "a b": 1, "€": 2}, []))
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert token_bytes(wrapped, 3) == [b" a", b"a b", "€".encode()]
    assert wrapped.decode([0, 1, 2]) == " aa b€"


def test_tokenizers_that_lose_the_text_are_refused() -> None:
    word_piece = BertTokenizerFast(
        vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "se": 5, "##ven": 6}
    )
    with pytest.raises(
        ValueError, match=r"of a BertTokenizer stand for: .* WordPiece \+ continuing_subword_prefix;"
    ) as e:
        token_bytes(word_piece, 7)
    assert "\n" not in str(e.value)
    suffixed = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    for decoder, found in (
        (decoders.ByteLevel(), r"ByteLevel \+ end_of_word_suffix"),  # CLIP
        (decoders.Metaspace(), r"Metaspace \+ end_of_word_suffix"),
        (decoders.BPEDecoder(), r"BPEDecoder \+ end_of_word_suffix"),
    ):
        suffixed.decoder = decoder
        with pytest.raises(ValueError, match=f"of a TokenizersBackend .* here it is {found};"):
            token_bytes(PreTrainedTokenizerFast(tokenizer_object=suffixed), 2)
    plain = Tokenizer(models.WordLevel({"one": 0}))
    with pytest.raises(ValueError, match="here it is no decoder;"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=plain), 1)
    with pytest.raises(ValueError, match="of a object stand for: .* here it is no decoder;"):
        token_bytes(object(), 1)  # without a tokenizers-library backend
    plain.decoder = decoders.Sequence([decoders.Replace(Regex("▁+"), " "), decoders.Fuse()])
    with pytest.raises(ValueError, match=r"here it is Replace \+ Fuse;"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=plain), 1)


# --- response_text ---------------------------------------------------------------------------------------------------


def test_response_text_loses_only_the_cut_character() -> None:
    spelled = "한국 👍".encode()
    expected = {0: "", 3: "한", 5: "한", 6: "한국", 7: "한국 ", 8: "한국 ", 10: "한국 ", 11: "한국 👍"}
    for end, text in expected.items():
        assert response_text([spelled[:2], spelled[2:end]] if end > 2 else [spelled[:end]]) == text
    assert response_text([]) == ""
    assert response_text([b"ok ", b"\xff", b" lost"]) == "ok "
    assert response_text([b"\xed\xa0\x80"]) == ""  # a surrogate is no character of UTF-8


# --- align_response --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("one| two", "one| two", [0, 1]),
        ("se|ven| eight", "seven| ei|ght", [-1, -1, -1]),
        ("seven| eight", "se|ven| eight", [-1, 2]),
        ("se|ven| eight", "s|even| eight", [-1, -1, 2]),
        ("a|bc|d", "ab|c|d", [-1, -1, 2]),
        ("今|天天|气", "今|天|天|气", [0, -1, 3]),
        # Empty tokens are nobody's: the EOS, or padding on either side.
        ("one|| two|", "|one|| two|", [1, -1, 3, -1]),
        ("", "", [-1]),
        # One space more on one side.
        ("seven| one", " seven| one", [0, 1]),
        (" seven| one", "seven| one", [0, 1]),
        ("seven| one", " |seven| one", [1, 2]),
        (" |seven| one", "seven| one", [-1, 0, 1]),
        ("seven| one", " se|ven| one", [-1, 2]),
        (" seven", "  seven", [0]),
        (" seven", " | seven", [1]),
        (" |seven", " | |seven", [1, 2]),
        ("   |seven", "  |seven", [0, 1]),
        (" | seven", "▁seven", [-1, -1]),
        ("seven| one", "   seven| one", [-1, -1]),  # two spaces are no dummy prefix
        (" |  |seven", " |seven", [0, -1, -1]),
        # Texts that differ: up to the first different byte.
        ("one| two| three", "one| two", [0, 1, -1]),
        ("one| two", "one| two| three", [0, 1]),
        ("one| t|wo| three", "one| t|oo| three", [0, 1, -1, -1]),
        ("one| tw", "one| two", [0, -1]),
        ("one|x", "one|y", [0, -1]),
        ("one| ax| b", "one| ay| b", [0, -1, -1]),
        ("x|one", "y|one", [-1, -1]),
        (" x|one", "y|one", [-1, -1]),
    ],
)
def test_alignment_counted_by_hand(student: str, teacher: str, expected: list[int]) -> None:
    assert align_response(pieces(student), pieces(teacher)) == expected


def test_no_tokens() -> None:
    assert align_response([], pieces("one")) == []
    assert align_response(pieces("one"), []) == [-1]


@pytest.mark.parametrize(
    ("text", "student_words", "student", "teacher_words", "teacher", "expected"),
    [
        # Latin with diacritics, digits one by one, a leading space and two spaces in a row
        (
            " zwölf  straße 12", [" zwölf", " str", "aße"], " zwölf| | str|aße| |1|2",
            [" zw", "ölf", " straße", " 12"], " zw|ölf| | straße| 12", [-1, 2, -1, -1, -1, -1, -1],
        ),
        # Chinese
        ("今天天气很好", ["今天", "天气", "很好"], "今天|天气|很好", ["今天", "天气很好"], "今天|天气很好", [0, -1, -1]),
        # Japanese, kana and kanji
        ("東京は晴れ", ["東京", "は", "晴れ"], "東京|は|晴れ", ["東", "京", "は晴れ", "は"], "東|京|は晴れ", [-1, -1, -1]),
        ("カナと東京", ["カナ", "と", "東京"], "カナ|と|東京", ["カ", "ナ", "と", "東京"], "カ|ナ|と|東京", [-1, 2, 3]),
        # Korean text
        ("안녕 세계", ["안녕", " 세계"], "안녕| 세계", ["안", "녕", " 세계"], "안|녕| 세계", [-1, 2]),
        # Emoji
        ("ok 👍👍", ["ok", " 👍", "👍"], "ok| 👍|👍", ["ok", " 👍👍"], "ok| 👍👍", [0, -1, -1]),
    ],
)  # fmt: skip
def test_byte_level_to_byte_level(
    text: str, student_words: list[str], student: str, teacher_words: list[str], teacher: str, expected: list[int]
) -> None:
    student_tokens = encode(byte_level(student_words), text)
    teacher_tokens = encode(byte_level(teacher_words), text)
    assert student_tokens == pieces(student)
    assert teacher_tokens == pieces(teacher)
    assert align_response(student_tokens, teacher_tokens) == expected


def test_tokens_inside_a_character() -> None:
    student_tokens = encode(byte_level(["天"]), "天気")
    teacher_tokens = encode(metaspace_bpe(["天"]), "天気")
    assert student_tokens == ["天".encode(), b"\xe6", b"\xb0", b"\x97"]  # 気 is three bytes for both
    assert teacher_tokens == [" 天".encode(), b"\xe6", b"\xb0", b"\x97"]
    assert align_response(student_tokens, teacher_tokens) == [0, 1, 2, 3]
    whole = encode(byte_level(["天気"]), "天気")
    assert whole == ["天気".encode()]
    assert align_response(student_tokens, whole) == [-1, -1, -1, -1]


@pytest.mark.parametrize(
    ("prepend", "teacher", "teacher_of_spaced", "aligned_of_spaced"),
    [
        ("first", " k| eight| |1|2", " k| eight", [0, 1]),
        ("always", " k| eight| |1|2", " k| eight", [0, 1]),
        ("normalizer", " k| eight| |1|2", " | k| eight", [1, 2]),  # its prefix comes on top of a space
        ("never", "k| eight| |1|2", " k| eight", [0, 1]),
    ],
)
def test_byte_level_to_sentencepiece(
    prepend: str, teacher: str, teacher_of_spaced: str, aligned_of_spaced: list[int]
) -> None:
    student_tokenizer = byte_level(["k", " k", " eight", " 12"])
    teacher_tokenizer = metaspace_bpe(["k eight"], prepend=prepend)
    student_tokens, teacher_tokens = encode(student_tokenizer, "k eight 12"), encode(teacher_tokenizer, "k eight 12")
    assert student_tokens == pieces("k| eight| 12")
    assert teacher_tokens == pieces(teacher)
    assert align_response(student_tokens, teacher_tokens) == [0, 1, -1]
    student_tokens, teacher_tokens = encode(student_tokenizer, " k eight"), encode(teacher_tokenizer, " k eight")
    assert student_tokens == pieces(" k| eight")
    assert teacher_tokens == pieces(teacher_of_spaced)
    assert align_response(student_tokens, teacher_tokens) == aligned_of_spaced


def test_a_response_cut_inside_a_character() -> None:
    student_tokens = [*pieces("안녕| 세"), b"\xea\xb3"]  # 계 is ea b3 84
    assert response_text(student_tokens) == "안녕 세"
    teacher_tokens = encode(byte_level(["안녕", " 세"]), "안녕 세")
    assert align_response(student_tokens, teacher_tokens) == [0, 1, -1]
    replaced = pieces("안녕| 세|\N{REPLACEMENT CHARACTER}")
    assert align_response(student_tokens, replaced) == [0, 1, -1]
    inside = [*pieces("안녕"), " 세".encode() + b"\xea", b"\xb3"]  # the cut character begins in an earlier token
    assert align_response(inside, teacher_tokens) == [0, -1, -1]


def test_a_teacher_that_normalises_the_text() -> None:
    student, teacher = byte_level(["one", " one", " caf"]), byte_level(["one", " one", " caf"])
    teacher.backend_tokenizer.normalizer = normalizers.NFC()
    student_tokens, teacher_tokens = encode(student, "one cafe\u0301 one"), encode(teacher, "one cafe\u0301 one")
    assert student_tokens == [b"one", b" caf", b"e", b"\xcc", b"\x81", b" one"]
    assert teacher_tokens == [b"one", b" caf", b"\xc3", b"\xa9", b" one"]
    assert align_response(student_tokens, teacher_tokens) == [0, 1, -1, -1, -1, -1]


def test_properties_of_alignment(
    byte_level_tokenizers: list[PreTrainedTokenizerFast], sentencepiece_tokenizers: list[PreTrainedTokenizerFast]
) -> None:
    tokenizers = [*byte_level_tokenizers, *sentencepiece_tokenizers]
    rng = random.Random(2)
    num_aligned = num_cut = 0
    for text in [*TEXTS, *random_texts(15)]:
        spelled = {tokenizer: encode(tokenizer, text) for tokenizer in tokenizers}
        for student in tokenizers:
            whole = spelled[student]
            assert align_response(whole, whole) == list(range(len(whole)))
            cut = whole[: rng.randrange(len(whole)) + 1]
            given = response_text(cut)
            num_cut += given.encode() != b"".join(cut)
            for teacher in tokenizers:
                for ours, theirs in ((whole, spelled[teacher]), (cut, encode(teacher, given))):
                    num_aligned += check_alignment(ours, theirs)
    assert num_aligned > 1000
    assert num_cut > 20


def check_alignment(student: Tokens, teacher: Tokens) -> int:
    """Asserts what holds for any two token lists; returns how many tokens align."""
    aligned = align_response(student, teacher)
    pairs = [(i, j) for i, j in enumerate(aligned) if j >= 0]
    assert len(aligned) == len(student)
    assert all(a < b for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False))
    back = align_response(teacher, student)
    assert pairs == [(i, j) for j, i in enumerate(back) if i >= 0]
    for i, j in pairs:
        # The same bytes after the same bytes, but for one leading space of the response.
        ours, theirs = b"".join(student[: i + 1]), b"".join(teacher[: j + 1])
        assert ours == theirs or b" " + ours == theirs or ours == b" " + theirs
        shorter, longer = sorted((student[i], teacher[j]), key=len)
        assert shorter == longer or (longer == b" " + shorter and shorter in (ours, theirs))
    return len(pairs)
