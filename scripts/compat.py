"""Whether an export runs alike under every supported transformers: python scripts/compat.py (make compat)

One virtual environment for each version, in .compat/, without this project; the first run installs them (about 1.2 GB
each). In each, scripts/compat_probe.py transcribes synthetic speech with an export of seeds/tiny_teacher, and bench.gpu
runs with its tiny size on the CPU. Exit status 1 where transcripts differ from those in the project's own environment, or
from what was spoken, or where a case of bench.gpu has no figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from data.espeak import SAMPLING_RATE, synthesise
from data.mixing import mix, rms, trim
from data.synthetic import DIGITS, TRAINING_VOICES
from opd.export import load_model, load_processor, save_arkasr

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("4.57.6", "5.10.4", "5.24.0")  # the oldest that is supported, verl's, the newest tested
NUM_CLIPS, NUM_LONG = 8, 42  # utterances by themselves, and in the recording of 70 s
PAUSE = 0.1  # seconds before and after each utterance, as the tiny teacher was trained
ENCODED_ONCE = "audio encoded once"
BENCH = "bench.gpu, tiny"
NOISY = "rollout_tiny/read_weights"  # a difference of two short times, which may be nothing
WINDOW = 2.6  # seconds; an utterance is longer than half of it, so a window holds just one


class Utterance(NamedTuple):
    samples: np.ndarray
    text: str


def spoken_digits(number: int, seed: int) -> list[Utterance]:
    """Digit strings of 1.35 to 2.55 s, at an SNR of 30 dB, with a pause at both ends."""
    generator = np.random.default_rng(seed)
    utterances: list[Utterance] = []
    while len(utterances) < number:
        text = " ".join(generator.choice(DIGITS, size=int(generator.integers(4, 6))))
        voice = TRAINING_VOICES[len(utterances) % 10]
        speech = trim(synthesise(text, voice.espeak, int(generator.integers(130, 200)), 40)[0])
        padded = np.pad(speech / rms(speech), round(PAUSE * SAMPLING_RATE))
        if WINDOW / 2 + 0.05 < len(padded) / SAMPLING_RATE < WINDOW - 0.05:
            noise = generator.standard_normal(len(padded))
            utterances.append(Utterance(mix(padded, noise, snr=30.0, level=-24.0), text))
    return utterances


def write_speech(folder: Path, num_long: int = NUM_LONG) -> list[str]:
    """Writes the clips that the probe reads; returns what is spoken in each, and in the recording's utterances."""
    utterances = spoken_digits(NUM_CLIPS + num_long, seed=0)
    for index, utterance in enumerate(utterances[:NUM_CLIPS]):
        soundfile.write(folder / f"clip-{index}.wav", utterance.samples, SAMPLING_RATE, subtype="FLOAT")
    long = np.concatenate([utterance.samples for utterance in utterances[NUM_CLIPS:]])
    soundfile.write(folder / "long.wav", long, SAMPLING_RATE, subtype="FLOAT")
    return [utterance.text for utterance in utterances]


def environment(version: str, torch: str, folder: Path) -> Path:
    """The Python of a virtual environment with that version of transformers, made where it is missing."""
    home = folder / f"transformers-{version}"
    python, wanted = home / "bin" / "python", [torch, f"transformers=={version}", "soundfile"]
    stamp = home / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8").split() != wanted:
        print(f"installing {' '.join(wanted)} in {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        for requirements in ([torch], wanted):  # torch by itself: the index may offer a CPU wheel of this very version
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text("\n".join(wanted), encoding="utf-8")
    return python


def run_probe(python: Path, export: Path, audio_dir: Path, out: Path) -> dict[str, Any]:
    """The facts that the probe writes in that environment; -I keeps this project off its path."""
    caches = {"HF_HOME": str(out.with_suffix("")), "HF_MODULES_CACHE": str(out.with_suffix("")), "HF_HUB_OFFLINE": "1"}
    command: list[str | Path] = [python, "-I", ROOT / "scripts" / "compat_probe.py", export, audio_dir, out]
    done = subprocess.run(command, env={**os.environ, **caches}, cwd=out.parent, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{python}: the probe failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def run_bench(python: Path, out: Path) -> list[str]:
    """The cases of bench.gpu that have no figures in that environment, which has nothing but torch and transformers."""
    command: list[str | Path] = [
        python,
        "-m",
        "bench.gpu",
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--runs",
        "1",
        "--json",
        out,
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if not out.is_file():
        raise ValueError(f"{python}: bench.gpu failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    rows = json.loads(out.read_text(encoding="utf-8"))
    return [row["case"] for row in rows if row["ours_s"] is None and row["case"] != NOISY]


def differences(own: dict[str, Any], other: dict[str, Any], texts: list[str]) -> list[str]:
    """Checks whose transcripts are not those of the project's own environment, or not what was spoken."""
    spoken = {"pipeline, 70 s": [" ".join(texts[NUM_CLIPS:])]}
    found = [
        name
        for name, transcripts in other["checks"].items()
        if transcripts != own["checks"][name] or transcripts != spoken.get(name, texts[:NUM_CLIPS])
    ]
    words = {word for text in other["sampled"] for word in text.split()}
    found += ["sampled"] * (len(other["sampled"]) != NUM_CLIPS or not words or not words <= set(DIGITS))
    return found + [ENCODED_ONCE] * (other["encoder_calls"] != 1)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make compat", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--versions", nargs="+", default=VERSIONS, help=f"of transformers (default {' '.join(VERSIONS)})"
    )
    parser.add_argument("--torch", default="torch==2.13.0", help="requirement of the environments")
    arguments = parser.parse_args()
    try:
        pythons = {name: environment(name, arguments.torch, ROOT / ".compat") for name in arguments.versions}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            seed = ROOT / "seeds" / "tiny_teacher"
            model = load_model(seed)
            export = save_arkasr(model.state_dict(), model.config, load_processor(seed), folder / "export", "float32")
            texts = write_speech(folder)
            own = run_probe(Path(sys.executable), export, folder, folder / "own.json")
            others = {name: run_probe(pythons[name], export, folder, folder / f"{name}.json") for name in pythons}
            own["no_figures"] = run_bench(Path(sys.executable), folder / "own-bench.json")
            for name, facts in others.items():
                facts["no_figures"] = run_bench(pythons[name], folder / f"{name}-bench.json")
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(own, others, texts)


def report(own: dict[str, Any], others: dict[str, dict[str, Any]], texts: list[str]) -> int:
    """Prints the table; returns the exit status."""
    clips, long = (sum(len(text.split()) for text in part) for part in (texts[:NUM_CLIPS], texts[NUM_CLIPS:]))
    print(f"{NUM_CLIPS} clips of {clips} words, and a recording of {long} words; '=' where all are as spoken\n")
    columns = {f"own {own['transformers']}": own} | others
    found = {
        name: differences(own, facts, texts) + [BENCH] * bool(facts["no_figures"]) for name, facts in columns.items()
    }
    print(f"{'transformers':28s}" + "".join(f"{name:>14s}" for name in columns))
    for check in [*own["checks"], "sampled", ENCODED_ONCE, BENCH]:
        print(f"{check:28s}" + "".join(f"{'DIFFERS' if check in found[name] else '=':>14s}" for name in columns))
    for name, checks in found.items():
        for check in checks:
            facts = columns[name]
            other = {"sampled": facts["sampled"], ENCODED_ONCE: facts["encoder_calls"], BENCH: facts["no_figures"]}
            print(f"error: {name}: {check}: {json.dumps((facts['checks'] | other)[check])}", file=sys.stderr)
    return int(any(found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
