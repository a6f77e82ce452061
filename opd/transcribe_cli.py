"""The command lines of transcription and evaluation, with the flags of the ARK-ASR model card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from data.command_line import check_writable
from opd.arkasr.loading import check_path, named_by
from opd.batch_transcribe import Journal, ManifestJob, ModelSettings, Outcome, measure, plan_batches
from opd.device_pool import outcomes_on
from opd.results import SetResult, print_results, score_leaderboard_file, score_rows, summarise, write_leaderboard_file
from opd.text import normaliser_name, resolve_language
from opd.transcribe import ATTENTION, DecodeSettings, default_devices
from opd.types import DTYPES

# What becomes of the transcribed rows of a job: the rows to write, and the set's result.
Finish = Callable[[ManifestJob, list[dict[str, Any]]], tuple[list[dict[str, Any]], SetResult]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that transcription and evaluation share."""
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="JSONL", help="one or more manifests")
    add("--output", required=True, help="result JSONL; a folder where there are several inputs")
    add("--model_path", required=True, help="ARK-ASR folder or Hub id")
    add("--processor_path", help="folder or Hub id of the processor (default: --model_path)")
    add("--batch_size", type=int, default=40, help="windows decoded at a time (default: %(default)s)")
    add("--max_new_tokens", type=int, default=256, help="per window (default: %(default)s)")
    add("--do_sample", action="store_true", help="draw tokens at --temperature instead of taking the likeliest")
    add("--temperature", type=float, help=f"of --do_sample (default: {DecodeSettings.temperature})")
    add("--num_beams", type=int, default=1)
    add("--repetition_penalty", type=float, default=1.0)
    add("--seed", type=int, default=0, help="of the draws")
    add("--target_sr", type=int, default=16000, help="the model hears 16000 Hz; audio is resampled to it")
    add(
        "--max_audio_seconds",
        type=float,
        default=40.0,
        help="longest window; longer audio is cut at silences, transcribed in parts and joined (default: %(default)s)",
    )
    add("--audio_gain", type=float, default=1.0, help="factor on the samples, which are limited to [-1, 1]")
    add(
        "--asr_block_token_id_from",
        type=int,
        default=151670,
        help="ids from here on are never written; -1: only control tokens are blocked (default: %(default)s)",
    )
    add(
        "--padding_side", choices=("left", "right"), default="left", help="of the prompts; right only with batch size 1"
    )
    add("--attn_impl", choices=ATTENTION, default="auto")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on the CPU, else as stored")
    add("--audio_field", default="audio")
    add("--text_field", default="text")
    add("--begin_field", default="begin_time")
    add("--end_field", default="end_time")
    add("--language", help="of the rows that name none (English name or ISO code)")
    add("--devices", help="cpu, cuda:0,cuda:1, ... (default: all CUDA devices, else the CPU)")
    add("--overwrite", action="store_true", help="begin anew where --output holds a result of other settings")


def run(args: argparse.Namespace, finish: Finish, require_text: bool = False) -> list[SetResult]:
    """Transcribes every manifest of `args` and writes what `finish` makes of it; returns the sets' results.

    All manifests are read before the first is begun. Raises ValueError for bad input.
    """
    model = _model_settings(args)
    _check_paths(args)
    devices = args.devices.split(",") if args.devices else default_devices()
    _check_devices(devices)
    jobs = [_open_job(args, model, source, output, require_text) for source, output in _outputs(args)]
    journals = [Journal(job, args.overwrite) for job in jobs]
    return [
        _run_job(job, journal, model, devices, args.batch_size, finish)
        for job, journal in zip(jobs, journals, strict=True)
    ]


def _run_job(
    job: ManifestJob, journal: Journal, model: ModelSettings, devices: list[str], batch_size: int, finish: Finish
) -> SetResult:
    clips = [(line, job.rows[line][1]) for line in journal.remaining()]
    kept = len(job.rows) - len(clips)
    if kept:
        print(f"{job.source}: {kept} of {len(job.rows)} utterances are done already", file=sys.stderr)
    seconds, unreadable = measure(clips)
    journal.add(unreadable)
    batches = plan_batches(clips, seconds, batch_size, model.decode.max_audio_seconds)
    if batches:
        outcomes = outcomes_on(devices, model, batches, batch_size)
        for batch in _with_progress(outcomes, job.source.name, sum(seconds.values())):
            journal.add(batch)
    rows, result = finish(job, journal.rows())
    journal.write_result(rows, result)
    return result


def _with_progress(outcomes: Iterable[list[Outcome]], name: str, total_seconds: float) -> Iterable[list[Outcome]]:
    """Shows how much audio is done, how many times faster than it was spoken, and the time left."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rtfx]}x real time"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total_seconds, rtfx="-")
        last_report = 0.0
        for batch in outcomes:
            yield batch
            progress.update(task, advance=sum(outcome.audio_seconds for outcome in batch))
            shown = progress.tasks[0]
            elapsed = shown.elapsed or 1e-9
            rtfx = shown.completed / elapsed
            progress.update(task, rtfx=f"{rtfx:.1f}")
            if progress.disable and elapsed - last_report >= 30:  # a log file gets a line now and then
                last_report = elapsed
                left = (total_seconds - shown.completed) / max(rtfx, 1e-9)
                share = shown.completed / total_seconds
                print(f"{name}: {share:.0%} done, {rtfx:.1f}x real time, {left:.0f} s left", file=sys.stderr)


def _model_settings(args: argparse.Namespace) -> ModelSettings:
    if args.batch_size < 1:
        raise ValueError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.target_sr != 16000:
        raise ValueError(f"--target_sr {args.target_sr}: the model hears 16000 Hz; leave out, audio is resampled")
    if args.temperature is not None and not args.do_sample:
        raise ValueError(f"--temperature {args.temperature:g}: only draws have one; add --do_sample, or leave it out")
    if args.padding_side == "right" and args.batch_size > 1:
        raise ValueError("--padding_side right: a batch is generated from its right end; use left, or --batch_size 1")
    return ModelSettings(
        args.model_path,
        args.processor_path,
        args.dtype,
        args.attn_impl,
        DecodeSettings(
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            temperature=DecodeSettings.temperature if args.temperature is None else args.temperature,
            num_beams=args.num_beams,
            repetition_penalty=args.repetition_penalty,
            max_audio_seconds=args.max_audio_seconds,
            audio_gain=args.audio_gain,
            block_token_id_from=args.asr_block_token_id_from,
            seed=args.seed,
        ),
    )


def _open_job(
    args: argparse.Namespace, model: ModelSettings, source: Path, output: Path, require_text: bool
) -> ManifestJob:
    names = {
        "audio": args.audio_field,
        "text": args.text_field,
        "begin_time": args.begin_field,
        "end_time": args.end_field,
    }
    if args.language:
        _check_language(args.language, f"--language {args.language}")
    job = ManifestJob.open(source, output, model, names, args.language)
    if require_text:
        for number, (_, utterance) in enumerate(job.rows, start=1):
            if utterance.text is None:
                raise ValueError(
                    f"{source}: utterance {number} has no `{args.text_field}`; evaluation needs references"
                )
            if utterance.language:
                _check_language(utterance.language, f"{source}: utterance {number}")
    return job


def _check_language(name: str, where: str) -> None:
    try:
        resolve_language(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_paths(args: argparse.Namespace) -> None:
    """Before manifests are read and results begun."""
    for flag, path in (("--model_path", args.model_path), ("--processor_path", args.processor_path)):
        if path is not None:
            with named_by(f"{flag} ", path):
                check_path(path)


def _outputs(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(manifest, result file) pairs."""
    sources, output = [Path(source) for source in args.input], Path(args.output)
    if len(sources) == 1 and not output.is_dir():
        pairs = [(sources[0], output)]
    else:
        if output.suffix == ".jsonl" or output.is_file():
            raise ValueError(f"--output {output}: several manifests need a folder, which gets a file for each")
        names = [source.stem for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"--input: two manifests have the same name ({', '.join(names)}); rename one")
        pairs = [(source, output / f"{source.stem}.jsonl") for source in sources]
    for source, target in pairs:
        if source.absolute() == target.absolute():
            raise ValueError(f"--output {target}: is the input itself; choose another file")
    return pairs


def _check_devices(devices: list[str]) -> None:
    for name in devices:
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            first_line = str(error).splitlines()[0]
            raise ValueError(
                f"--devices {name}: cannot be used ({first_line}); there are {', '.join(default_devices())}"
            ) from error


def main_of(command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Runs a command line; returns its exit status, with one line on stderr for what a user can mend."""
    transformers.utils.logging.disable_progress_bar()
    try:
        return command(parser.parse_args(argv))
    except torch.OutOfMemoryError as error:
        message = f"{str(error).splitlines()[0]}; use a smaller --batch_size, what is done is kept"
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to go on"
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def failures_status(results: list[SetResult]) -> int:
    """1, after a line that says so, where utterances failed; else 0."""
    failed = sum(result.failed for result in results)
    if failed:
        print(
            f"error: {failed} utterances could not be transcribed: see `error` in their rows; once mended, the same "
            "command does only those",
            file=sys.stderr,
        )
    return 1 if failed else 0


# -- scripts/infer/ark_asr_transformers.py -----------------------------------------------------------------------------


def transcribe_command(args: argparse.Namespace) -> int:
    results = run(args, lambda job, rows: (rows, summarise(job.source.stem, rows)))
    print_results(results, f"{args.model_path}: {args.output}")
    return failures_status(results)


def transcribe_main(argv: list[str]) -> int:
    """`--input manifest --output result --model_path checkpoint`: adds pred_text and pred_text_raw to every row."""
    parser = argparse.ArgumentParser(description="Transcribes manifests with an ARK-ASR checkpoint.")
    add_arguments(parser)
    return main_of(transcribe_command, parser, argv)


# -- scripts/eval/eval_jwer_ark_asr_transformers.py --------------------------------------------------------------------


def evaluate_command(args: argparse.Namespace) -> int:
    normaliser = "opd-basic-1" if args.disable_text_normalize else args.normaliser
    normaliser_name(None, normaliser)  # raises for an unknown one, before hours of decoding
    board = args.leaderboard
    if board and args.dataset_ids and len(args.dataset_ids) != len(args.input):
        raise ValueError(f"--dataset_ids: {len(args.dataset_ids)} names for {len(args.input)} manifests; one for each")
    if board:
        check_writable("--leaderboard ", Path(board), is_folder=True)
    dataset_ids = dict(zip(args.input, args.dataset_ids or [Path(source).stem for source in args.input], strict=True))
    files: list[Path] = []

    def finish(job: ManifestJob, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], SetResult]:
        references = [utterance.text or "" for _, utterance in job.rows]
        languages = [utterance.language for _, utterance in job.rows]
        if board:
            names = args.model_id or _model_id(args.model_path), dataset_ids[str(job.source)]
            files.append(write_leaderboard_file(board, *names, rows, references, args.language or "en"))
        return score_rows(job.source.stem, rows, references, languages, normaliser)

    results = run(args, finish, require_text=True)
    print_results(results, f"{args.model_path}: {args.output}")
    if files:
        scored = [score_leaderboard_file(path, args.language or "en") for path in files]
        print_results(scored, f"Open ASR Leaderboard: {board}")
    return failures_status(results)


def evaluate_main(argv: list[str]) -> int:
    """As `transcribe_main`, and scores every row against its reference."""
    parser = argparse.ArgumentParser(description="Transcribes manifests with an ARK-ASR checkpoint and scores them.")
    add_arguments(parser)
    parser.add_argument("--normaliser", default="auto", help="name of the scoring rules (default: by language)")
    parser.add_argument("--disable_text_normalize", action="store_true", help="only case and punctuation are ignored")
    parser.add_argument("--leaderboard", metavar="FOLDER", help="also write the Open ASR Leaderboard's result files")
    parser.add_argument(
        "--dataset_ids", nargs="+", metavar="PATH_NAME_SPLIT", help="with --leaderboard: each input's name"
    )
    parser.add_argument("--model_id", help="with --leaderboard: the model's name (default: from --model_path)")
    return main_of(evaluate_command, parser, argv)


def _model_id(model_path: str) -> str:
    return Path(model_path).name if Path(model_path).is_dir() else model_path
