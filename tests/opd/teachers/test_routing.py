"""Several teachers: which utterance goes where, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from opd.config import Config, load_config
from opd.teachers.languages import QWEN3_ASR_LANGUAGES, find_language, known_languages
from opd.teachers.routing import Router
from opd.types import Utterance

TWO = (
    "teacher.routes={asia: {match: {language: [zh, Japanese]}, kind: qwen3_asr, path: q, num_workers: 2},"
    " calls: {match: {domain: [call, phone]}, path: b}, rest: {}}"
)


def config(*overrides: str) -> Config:
    return load_config(["recipe=tiny", *overrides])


def utterance(name: str, language: str | None = "English", **extra: Any) -> Utterance:
    return Utterance(id=name, audio=f"{name}.wav", language=language, extra=extra)


def test_routes_take_utterances_in_their_order() -> None:
    router = Router(config(TWO))
    assert list(router.teachers) == ["asia", "calls", "rest"]
    assert router.teachers["asia"].kind == "qwen3_asr"
    assert router.teachers["calls"].kind == "arkasr"
    assert (router.teachers["calls"].path, router.teachers["rest"].path) == ("b", "seeds/tiny_teacher")
    batch = [
        utterance("a", "Chinese"), utterance("b", "en"), utterance("c", "ja-JP"), utterance("d", None, domain="phone"),
        utterance("e", "cmn", domain="call"), utterance("f", None),
    ]  # fmt: skip
    assert router.split(batch) == {"asia": [0, 2, 4], "calls": [3], "rest": [1, 5]}
    assert Router(config()).split(batch) == {"": [0, 1, 2, 3, 4, 5]}


@pytest.mark.parametrize(
    ("match", "taken"),
    [
        ("{task: asr}", ["a", "b", "c", "d"]),
        ("{room: 0}", ["a", "b"]),
        ("{room: '1'}", ["c"]),
        ("{clean: true}", ["a", "d"]),
        ("{room: null}", ["d"]),
        ("{id: [a, c], task: asr}", ["a", "c"]),
        ("{room: None}", []),
    ],
)
def test_a_match_is_of_any_field_and_compares_what_is_written(match: str, taken: list[str]) -> None:
    router = Router(config(f"teacher.routes={{chosen: {{match: {match}}}, rest: {{}}}}"))
    batch = [
        utterance("a", room="0", clean=True), utterance("b", room=0, clean=False), utterance("c", room=1.0, clean=None),
        utterance("d", clean="true"),
    ]  # fmt: skip
    assert [u.id for u in batch if router.route(u) == "chosen"] == taken
    assert router.check(batch) == {name for name, used in (("chosen", taken), ("rest", len(taken) < 4)) if used}


def test_an_utterance_without_a_teacher_is_refused() -> None:
    router = Router(config(TWO.replace(", rest: {}", "")))
    router.check([utterance("a", "Chinese"), utterance("b", domain="call")])
    with pytest.raises(
        ValueError, match=r"utterance 'c' \(language English\) has no teacher.*asia, calls.*add a route"
    ):
        router.check([utterance("a", "Chinese"), utterance("c")])


def test_a_language_that_the_teacher_does_not_know_is_refused_with_those_it_knows() -> None:
    router = Router(config("teacher.kind=qwen3_asr", "teacher.path=q"))
    router.check([utterance("a", "Chinese"), utterance("b", "fil")])
    with pytest.raises(ValueError, match=r"utterance 'c': language 'Slovak' is not.*Arabic \(ar\).*Vietnamese \(vi\)"):
        router.check([utterance("a", "Chinese"), utterance("c", "Slovak")])
    with pytest.raises(
        ValueError, match=r"utterance 'd' has no language.*data.default_language.*teacher.language=auto"
    ):
        router.check([utterance("d", None)])
    Router(config("teacher.kind=qwen3_asr", "teacher.path=q", "teacher.language=auto")).check([utterance("d", None)])
    fixed = config("teacher.kind=qwen3_asr", "teacher.path=q", "teacher.language=Klingon")
    with pytest.raises(ValueError, match="teacher.language: language 'Klingon' is not one"):
        Router(fixed).check([utterance("a")])
    Router(config()).check([utterance("c", "Slovak"), utterance("d", None)])  # kind arkasr is told no language
    with pytest.raises(ValueError, match=r"teacher.routes.asia: utterance 'x' has no language"):
        Router(config(TWO.replace("language: [zh, Japanese]", "domain: x"))).check([utterance("x", None, domain="x")])


def test_a_prompt_that_names_the_language_says_which_it_knows() -> None:
    section = {"kind": "hf", "prompt": {"text": "{audio} in {language}", "languages": ["en", "Chinese", "fil"]}}
    assert known_languages(section) == {"en": "English", "zh": "Chinese", "fil": "Filipino"}
    assert known_languages(section | {"prompt": {"text": "{audio}"}}) is None
    assert known_languages(section | {"prompt": {"transcription": {"language": "{iso}"}}}).keys() >= {"sk", "ar"}
    with pytest.raises(ValueError, match="'Elvish'"):
        known_languages(section | {"prompt": {"text": "{audio}{iso}", "languages": ["Elvish"]}})


@pytest.mark.parametrize("name", ["Chinese", "zh", "zh-CN", "ZH", "mandarin", "cmn"])
def test_a_language_is_a_name_a_code_or_a_code_with_a_region(name: str) -> None:
    assert find_language(name, QWEN3_ASR_LANGUAGES) == ("zh", "Chinese")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=whisper"], "teacher.kind=whisper: must be one of arkasr, qwen3_asr, hf"),
        (["teacher.kind=hf"], "teacher.prompt: kind hf needs one of text, chat, transcription.*has none"),
        (["teacher.kind=hf", "teacher.prompt={text: a, chat: []}"], "one of text, chat, transcription"),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}', tex: b}"], "has text, tex"),
        (["teacher.kind=hf", "teacher.prompt={text: hello}"], "must have the placeholder {audio} once"),
        (["teacher.kind=hf", "teacher.prompt={chat: hello}"], "teacher.prompt.chat: must be a list"),
        (["teacher.kind=hf", "teacher.prompt={chat: [{role: user, content: [{type: text, text: Write}]}]}"], "0 times"),
        (["teacher.kind=hf", "teacher.prompt={chat: [{content: '{audio}'}, {content: [{type: audio}]}]}"], "2 times"),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}{iso}'}", "teacher.language=auto"], "names the language"),
        (["teacher.language=Klingon"], "teacher.language=Klingon: kind arkasr is told no language.*=manifest"),
        (["teacher.routes={a: {language: de}}"], "teacher.routes.a.language=de: kind arkasr is told no language"),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}'}", "teacher.language=en"], "this prompt names no language"),
        (["teacher.prompt={text: '{audio}'}"], "kind arkasr has its own prompt"),
        (["teacher.routes={a: {kinds: hf}}"], "teacher.routes.a: unknown key kinds; a route has .*kind"),
        (["teacher.routes={a: {match: en}}"], "teacher.routes.a: a route is a mapping"),
        (["teacher.routes={a: {num_workers: 0}}"], "teacher.routes.a.num_workers=0"),
        (["teacher.routes={a: {dtype: int8}}"], "teacher.routes.a.dtype=int8: must be one of float32"),
        (["teacher.routes={a: {path: null}}"], "teacher.routes.a.path is missing"),
        (["teacher.routes={a: {min_coverage: 2}}"], "teacher.routes.a.min_coverage=2: must be between 0 and 1"),
        (["teacher.routes={a: {language: [en]}}"], "teacher.routes.a.language"),
        (["teacher.routes={a: {min_coverage: null}}"], "teacher.routes.a.min_coverage=None: must be a number between"),
        (["teacher.routes={a: {path: 3}}"], "teacher.routes.a.path=3: must be the folder or the Hub id"),
        (["teacher.routes={a: {python_path: 3}}"], "teacher.routes.a.python_path=3: must be the path of a Python interp"),
        (["teacher.routes={a: {cache_dir: true}}"], "teacher.routes.a.cache_dir=True: must be a folder, or null"),
        (["teacher.routes={a: {gate_max_wer: x}}"], "teacher.routes.a.gate_max_wer=x: must be a WER from 0 on"),
        (["teacher.routes={a: {num_workers: true}}"], "teacher.routes.a.num_workers=True: must be a whole number"),
        (["teacher.routes={a: {kind: hf, prompt: [x]}}"], "teacher.routes.a.prompt=.*: must be a mapping with one of text"),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}{iso}', languages: 5}"], "prompt.languages=5: must be a list"),
        (
            ["teacher.kind=hf", "teacher.prompt={text: '{audio}{iso}', languages: English}"],
            r"teacher.prompt.languages=English: must be a list of languages .*such as \[English, German\]",
        ),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}', languages: [no]}"], r"prompt.languages=\[False\]: must"),
        (["stage=sft", "teacher.routes={a: {foo: 1}}"], "teacher.routes.a: unknown key foo; a route has"),
        (["stage=sft", "teacher.gate_max_wer=0.3"], "in a ladder set ladder.opd.teacher.gate_max_wer instead"),
    ],
)  # fmt: skip
def test_wrong_teacher_keys_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config(*overrides)
    assert "\n" not in str(caught.value)


def test_prompts_and_languages_that_fit_are_taken() -> None:
    chats = [
        "[{role: user, content: [{type: audio}, {type: text, text: Write}]}]",
        "[{role: user, content: '{audio} Write'}]",
    ]
    for chat in chats:
        config("teacher.kind=hf", f"teacher.prompt={{chat: {chat}}}", "teacher.language=auto")
    config("teacher.kind=hf", "teacher.prompt={transcription: {language: '{iso}'}}", "teacher.language=de")
    config("teacher.kind=qwen3_asr", "teacher.language=de")
    config("teacher.language=auto")


def test_a_route_alone_needs_no_teacher_path() -> None:
    assert Router(config("teacher.path=null", "teacher.routes={a: {path: b}}")).teachers["a"].path == "b"
