"""Turns pip's resolution report into constraints: `python .ci/pins.py report.json > constraints.txt`."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
pins = {item["metadata"]["name"]: item["metadata"]["version"].partition("+")[0] for item in report["install"]}
print("# The development environment, pinned; `make pins` rewrites this file. Local builds (+cpu) of a version fit.")
for name in sorted(pins, key=str.lower):
    if name != "arvis":
        print(f"{name}=={pins[name]}")
