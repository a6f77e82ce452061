"""Transcribes JSONL manifests and scores them; `--help` lists the flags, those of the ARK-ASR model card among them."""

import sys

from opd.transcribe_cli import evaluate_main

if __name__ == "__main__":
    raise SystemExit(evaluate_main(sys.argv[1:]))
