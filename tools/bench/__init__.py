"""Speed and memory of sdkit beside TRL's trainers: `python -m tools.bench` measures both and writes docs/performance.md."""
