"""What arvis claims about speed and memory, as programs that anyone can run: `python -m benchmarks.effects`."""
