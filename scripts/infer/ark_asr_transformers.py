"""Transcribes JSONL manifests; `--help` lists the flags, those of the ARK-ASR model card among them."""

import sys

from opd.transcribe_cli import transcribe_main

if __name__ == "__main__":
    raise SystemExit(transcribe_main(sys.argv[1:]))
