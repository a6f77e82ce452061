"""The named normalisers on hand-written examples of all 19 languages, and on strings that nobody writes."""

from __future__ import annotations

import importlib.metadata
import random
import subprocess
import sys

import pytest
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from whisper_normalizer.english import EnglishSpellingNormalizer

from opd.normalisers import NORMALISERS
from opd.numerals import require_pinned
from opd.text import LANGUAGES, normalise_for_scoring

# What one person writes = what another person writes for the same speech.
EQUAL = [
    ("en", "I'm sure it won't, can't and shouldn't.", "i am sure it will not can not and should not"),
    ("en", "Don’t you know? It’s here.", "do not you know it is here"),
    ("en", "Mr. Smith met Dr. Jones on St. Mary's Road", "mister smith met doctor jones on saint mary is road"),
    ("en", "The colour of the theatre's centre", "the color of the theater is center"),
    ("en", "I realise we travelled, grey-haired", "i realize we traveled gray haired"),
    ("en", "twenty-one", "21"),
    ("en", "one hundred and twenty three", "123"),
    ("en", "two thousand and five", "2005"),
    ("en", "three point five", "3.5"),
    ("en", "twenty dollars", "$20"),
    ("en", "two dollars and five cents", "$2.05"),
    ("en", "fifty percent", "50%"),
    ("en", "five million", "5,000,000"),
    ("en", "the twenty-first", "the 21st"),
    ("en", "nineteen eighties", "1980s"),
    ("en", "Uh, it's, mm, hmm, fine", "it is fine"),
    ("en", "gonna wanna gotta", "going to want to got to"),
    ("en", "[noise] well (laughs) yes", "well yes"),
    ("en", "naïve café", "naive cafe"),
    ("en", "Well... I… think so...", "well i think so"),
    ("de", "Er hat 21 Bücher.", "er hat einundzwanzig bücher"),
    ("de", "3,5 Prozent", "drei Komma fünf Prozent"),
    ("de", "3,5 %", "3.5%"),
    ("de", "1.000.000", "1 000 000"),
    ("de", "1'000 Franken", "eintausend Franken"),
    ("de", "1.234,5", "1 234,5"),
    ("de", "1984", "neunzehnhundertvierundachtzig"),
    ("de", "12.05.2024", "12. 5. 2024"),
    ("de", "Die U-Bahn – „pünktlich“!", "die u bahn pünktlich"),
    ("de", "Wie geht’s?", "Wie geht's"),
    ("de", "A\u0308pfel", "äpfel"),
    ("de", "GROẞE STRASSE", "große strasse"),
    ("de", "Ja [Musik] (Applaus) nein", "ja nein"),
    ("fr", "L’eau d'un été", "l'eau d’un été"),
    ("fr", "C'est l'œuvre de sa sœur", "c est l oeuvre de sa soeur"),
    ("fr", "21 ans", "vingt et un ans"),
    ("fr", "71", "soixante-et-onze"),
    ("fr", "3,14", "trois virgule quatorze"),
    ("fr", "1 000 €", "mille"),
    ("fr", "10 %", "dix pour cent"),
    ("fr", "Qu’est-ce que c’est ?", "qu'est ce que c'est"),
    ("es", "¿Cuántos años? ¡21!", "cuántos años veintiuno"),
    ("es", "3,5 millones", "tres coma cinco millones"),
    ("es", "21.000", "veintiún mil"),
    ("es", "el 50 %", "el cincuenta por ciento"),
    ("pl", "Mam 25 lat, źdźbło.", "mam dwadzieścia pięć lat źdźbło"),
    ("pl", "1984", "tysiąc dziewięćset osiemdziesiąt cztery"),
    ("pl", "3,5%", "trzy przecinek pięć procent"),
    ("it", "Dell’arte, l'università", "dell'arte l’università"),
    ("it", "118", "centodiciotto"),
    ("it", "ventitré", "23"),
    ("it", "2.024", "duemilaventiquattro"),
    ("it", "il 5 per cento", "il 5%"),
    ("ro", "Bucureşti şi ţara", "București și țara"),
    ("ro", "16 ani", "șaisprezece ani"),
    ("ro", "21.000", "douăzeci și unu de mii"),
    ("ro", "5 %", "cinci la sută"),
    ("hu", "Hűtő, őr: 21!", "hűtő őr huszonegy"),
    ("hu", "2024", "kétezer-huszonnégy"),
    ("hu", "102", "százkettő"),
    ("hu", "12 000", "tizenkétezer"),
    ("hu", "3,5 százalék", "három egész öt százalék"),
    ("cs", "Dvě stě, řeka", "200 řeka"),
    ("cs", "21", "dvacet jeden"),
    ("cs", "12. 5. 2024", "12.5.2024"),
    ("cs", "3,5 %", "tři čárka pět procent"),
    ("nl", "Eén van de 22 auto’s", "één van de tweeëntwintig auto's"),
    ("nl", "'s Avonds", "’s avonds"),
    ("nl", "1984", "negentienvierentachtig"),
    ("nl", "1.500 euro", "duizendvijfhonderd euro"),
    ("fi", "Hän on 21-vuotias", "hän on kaksikymmentäyksi vuotias"),
    ("fi", "3,14", "kolme pilkku yksi neljä"),
    ("fi", "2024", "kaksituhattakaksikymmentäneljä"),
    ("hr", "Ima 21 čašu, đak!", "ima dvadeset i jedan čašu đak"),
    ("hr", "2000", "dvije tisuće"),
    ("hr", "5 %", "pet posto"),
    ("sk", "21 ľudí", "dvadsaťjeden ľudí"),
    ("sk", "2024", "dvetisícdvadsaťštyri"),
    ("sk", "3,5", "tri čiarka päť"),
    ("sl", "21 črk, žaba", "enaindvajset črk žaba"),
    ("sl", "2024", "dva tisoč štiriindvajset"),
    ("sl", "10 %", "deset odstotkov"),
    ("et", "Õun ja 21 šokolaadi", "õun ja kakskümmend üks šokolaadi"),
    ("et", "3,5", "kolm koma viis"),
    ("lt", "Ąžuolas: 21 metai", "ąžuolas dvidešimt vienas metai"),
    ("lt", "100", "šimtas"),
    ("lt", "10 %", "dešimt procentų"),
    ("zh", "你好，世界！", "你好 世界"),
    ("zh", "二零二四年", "2024年"),
    ("zh", "二〇二四年三月五日", "２０２４年３月５日"),
    ("zh", "1998-2003年", "一九九八二零零三年"),
    ("zh", "一百二十三个", "123个"),
    ("zh", "百分之五十", "50％"),
    ("zh", "三点五", "3.5"),
    ("zh", "三分之一", "1/3"),
    ("zh", "零下五度和负五度", "零下5度和 -5度"),
    ("zh", "两百块，两只猫", "200块 2只猫"),
    ("zh", "一万二千", "12,000"),
    ("zh", "電話是幺三八零零一三八零零零", "电话是13800138000"),
    ("zh", "繁體中文，圖書館", "繁体中文图书馆"),
    ("zh", "我用 iPhone 手机", "我用iphone手机"),
    ("ja", "ｶﾀｶﾅ、ｶﾞｷﾞ", "カタカナガギ"),
    ("ja", "か゛くせい", "がくせい"),
    ("ja", "「はい」、そうです。", "はいそうです"),
    ("ja", "2024年", "二千二十四年"),
    ("ja", "二〇二四年", "２０２４年"),
    ("ja", "三〇分", "30分"),
    ("ja", "百二十三人", "123人"),
    ("ja", "3.5%", "三点五パーセント"),
    ("ja", "10,000円", "一万円"),
    ("ja", "サーバー・テスト", "ｻｰﾊﾞｰ テスト"),
    ("ko", "안녕하세요, 여러분!", "안녕하세요 여러분"),
    ("ko", "\u1112\u1161\u11ab\u1100\u1173\u11af", "한글"),
    ("ko", "2024년", "이천이십사년"),
    ("ko", "12345", "만이천삼백사십오"),
    ("ko", "3.5%", "삼점오퍼센트"),
    ("ko", "3시 30분", "세시 삼십분"),
    ("ko", "20살, 사과 5개", "스무살 사과 다섯개"),
    ("ko", "3개월 15시", "삼개월 십오시"),
    ("ko", "010-1234", "공일공 천이백삼십사"),
]

# What must stay an error.
DIFFERENT = [
    ("en", "twenty one", "22"),
    ("en", "I can", "I can't"),
    ("en", "cause", "because"),
    ("en", "the cat", "the cats"),
    ("de", "3,5", "35"),
    ("de", "schon", "schön"),
    ("de", "1.000", "1,0"),
    ("de", "Masse", "Maße"),
    ("fr", "a", "à"),
    ("fr", "dans l'eau", "dans leau"),
    ("fr", "3,5", "35"),
    ("es", "año", "ano"),
    ("es", "el", "él"),
    ("pl", "łaska", "laska"),
    ("it", "è", "e"),
    ("it", "l'ago", "lago"),
    ("ro", "fată", "față"),
    ("hu", "kor", "kór"),
    ("hu", "őr", "ör"),
    ("cs", "rád", "řád"),
    ("nl", "zo'n", "zon"),
    ("nl", "twee", "tweede"),
    ("fi", "tuli", "tuuli"),
    ("hr", "kuca", "kuća"),
    ("sk", "latka", "látka"),
    ("sl", "21", "12"),
    ("sl", "sama", "šama"),
    ("et", "öö", "õõ"),
    ("lt", "lietas", "liėtas"),
    ("zh", "一百二十三", "一百二十四"),
    ("zh", "3.5", "35"),
    ("zh", "他们", "她们"),
    ("zh", "十", "四"),
    ("ja", "カタカナ", "かたかな"),
    ("ja", "おばさん", "おばーさん"),
    ("ja", "ビル", "ビール"),
    ("ja", "はか", "ばか"),
    ("ko", "세 시", "네 시"),
    ("ko", "3개", "3개월"),
]


def compared(text: str, language: str) -> str:
    """Spaces do not count in Korean's character error rate."""
    text = normalise_for_scoring(text, language)
    return text.replace(" ", "") if language == "ko" else text


@pytest.mark.parametrize(("language", "left", "right"), EQUAL)
def test_the_same_speech_written_differently_is_equal(language: str, left: str, right: str) -> None:
    assert compared(left, language) == compared(right, language) != ""


@pytest.mark.parametrize(("language", "left", "right"), DIFFERENT)
def test_different_speech_stays_different(language: str, left: str, right: str) -> None:
    assert compared(left, language) != compared(right, language)


def test_every_language_has_examples() -> None:
    assert {row[0] for row in EQUAL} == {row[0] for row in DIFFERENT} == set(LANGUAGES)


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "Mr. O’Brien paid $1,000 -- uh, twice.", "mister 0 brien paid $1000 twice"),
        ("en", "double oh seven, minus five", "007 -5"),
        ("de", "Am 3. Mai: 1.000 Gäste (etwa) im „Café“!", "am drei mai eintausend gäste im café"),
        ("de", "MP3, 90er, 20%ige, 007, 1234567890123", "mp3 90er zwanzig prozentige 007 1234567890123"),
        ("de", "14:05 Uhr", "vierzehn fünf uhr"),
        ("fr", "l’eau\u00a0: 1\u202f000,5", "l eau mille virgule cinq"),
        ("es", "2.125", "dos mil ciento veinticinco"),
        ("es", "2,125", "dos coma ciento veinticinco"),
        ("it", "1,05", "uno virgola zero cinque"),
        ("nl", "Ĳs & co", "ijs co"),
        ("nl", "1905, 2500", "negentienvijf tweeduizendvijfhonderd"),
        ("et", "1,000,000", "üks miljon"),
        ("lt", "soft\u00adhyphen ❤\ufe0f", "softhyphen"),
        ("zh", "GPT4（笑）[音乐]好", "gpt四笑好"),
        ("zh", "1000年和2000年", "一千年和二零零零年"),
        ("zh", "歼-20，和 -5度", "歼二十和负五度"),
        ("zh", "29½", "二十九二分之一"),
        ("ja", "一九四五年の五六人", "千九百四十五年の五六人"),
        ("ko", "3.05, 027", "삼점영오 공이칠"),
        ("ko", "시장 3명, 3 시장", "시장 세명 삼 시장"),
    ],
)
def test_exact_forms(language: str, text: str, expected: str) -> None:
    assert normalise_for_scoring(text, language) == expected


def test_names_are_pinned_to_the_installed_packages() -> None:
    version = importlib.metadata.version("whisper-normalizer")
    assert list(NORMALISERS) == ["opd-basic-1", f"whisper-english-{version}", "european-1", "cjk-1"]
    chosen = [iso for normaliser in NORMALISERS.values() for iso in normaliser.languages]
    assert sorted(chosen) == sorted(LANGUAGES)
    require_pinned("whisper-normalizer", version)
    with pytest.raises(ValueError, match=r"needs num2words 0\.0\.1 \(installed: 0\..*\): run pip install num2words==0"):
        require_pinned("num2words", "0.0.1")
    with pytest.raises(ValueError, match=r"installed: none"):
        require_pinned("no-such-package-for-numbers", "1")


def test_english_is_whispers_own() -> None:
    """Against transformers' copy of Whisper's rules, which has none of whisper-normalizer's additions."""
    whisper = EnglishTextNormalizer(EnglishSpellingNormalizer().mapping)
    words = "kinda sorta dunno cause gonna twenty one hundred and a half point five double oh 3 0.5 $5 20% 7th 1980s"
    words += " minus dollars cents percent mr. dr. it's don't he'd been who's got uh mm colour (ah) [x] 1,000 the"
    choice = random.Random(0)
    texts = [" ".join(choice.choices(words.split(), k=8)) for _ in range(500)]
    texts += [
        text for language, *pair in EQUAL + DIFFERENT for text in pair if language == "en" and not set("’…") & set(text)
    ]
    for text in texts:
        assert normalise_for_scoring(text, "en") == " ".join(whisper(text).split()), text


@pytest.mark.parametrize("name", NORMALISERS)
def test_no_string_is_refused(name: str) -> None:
    choice = random.Random(1)
    marks = "0123456789.,,' %-−/()[]<>$’½²ⅷ年月〇一両两幺시살개aäșŞé\u0307\u00ad\ufe0f\u309b\x00\t\u3000ﾞカー한ᄏ㈱①"
    everything = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    texts = ["".join(choice.choices(marks, k=choice.randrange(30))) for _ in range(150)]
    texts += ["".join(choice.choices(everything, k=choice.randrange(30))) for _ in range(50)]
    texts += ["9" * 400, "9" * 5000, "0" * 400, "1." * 300, "1," * 300, "1 000" * 300, "<" * 500, "〇" * 500]
    texts += ["1/" * 300, "'" * 300, "9" * 4299 + " million", "(" * 500 + ")", "½" * 300, "3" * 12 + "," + "3" * 400]
    for language in (None, "de", *NORMALISERS[name].languages):
        for text in texts:
            clean = normalise_for_scoring(text, language, name)
            assert clean == " ".join(clean.split())


@pytest.mark.parametrize("language", [iso for iso in LANGUAGES if iso != "en"])
def test_a_normalised_text_stays_as_it_is(language: str) -> None:
    choice = random.Random(2)
    marks = "0123456789" * 2 + ".,,' %-/()[]aeßșşéœ年月日〇一二百両两시살개カーが한글"
    texts = ["".join(choice.choices(marks, k=choice.randrange(25))) for _ in range(200)]
    texts += [text for iso, *pair in EQUAL + DIFFERENT for text in pair if iso == language]
    for text in texts:
        once = normalise_for_scoring(text, language)
        assert normalise_for_scoring(once, language) == once, text


def test_importing_costs_no_library() -> None:
    heavy = {"jiwer", "opencc", "num2words", "unicode_rbnf", "whisper_normalizer", "torch", "regex"}
    code = f"import sys, opd.text; print(*sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
