"""`python gpu_check_dry_run.py`: every check of tools/gpu_check in miniature, on the CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.gpu_check.__main__ import main

sys.argv = ["gpu_check", "both", "--dry-run"]
main()
