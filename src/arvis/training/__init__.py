"""One training loop, and what it needs: schedules, precision, averages, checkpoints, ranks, losses of stage one."""
