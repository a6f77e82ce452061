"""Makes seeds/tiny_teacher and seeds/tiny_student again: python scripts/make_seeds.py [teacher student]

Each is the export of a run of recipe=tiny_teacher or recipe=tiny_student. The WER that each reached, which the run prints,
belongs into seeds/README.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    for name in sys.argv[1:] or ["teacher", "student"]:
        run_dir = ROOT / "runs" / f"seed_tiny_{name}"
        command = [sys.executable, "-m", "opd.train", f"recipe=tiny_{name}", f"run_dir={run_dir}"]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status:
            return status
        target = ROOT / "seeds" / f"tiny_{name}"
        shutil.rmtree(target, ignore_errors=True)
        # The export's model card names paths of the machine it was made on; seeds/README.md says what matters.
        shutil.copytree(run_dir / "export", target, ignore=shutil.ignore_patterns("README.md"))
        print(f"{target}: made")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
