"""The command line: each command is a function, its parameters are the flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import tyro

from arvis import __version__
from arvis.cli.facts import check, convert, doctor, info, list_systems, parity
from arvis.cli.pictures import evaluate, generate, reconstruct
from arvis.cli.runs import finetune, train
from arvis.cli.settings import each_set
from arvis.cli.speed import bench
from arvis.cli.terminal import one_line_errors
from arvis.cli.tokenizers import tokenizer

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "generate": generate,
    "train": train,
    "finetune": finetune,
    "reconstruct": reconstruct,
    "evaluate": evaluate,
    "bench": bench,
    "tokenizer": tokenizer,
    "systems": list_systems,
    "info": info,
    "parity": parity,
    "check": check,
    "convert": convert,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: errors of the user's making are one line on stderr and exit code 2; Ctrl-C is 130."""
    args = list(sys.argv[1:] if args is None else args)
    if args == ["--version"]:
        print(f"arvis {__version__}")
        return
    with one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="arvis",
            description="Autoregressive visual generation. `arvis --version` prints the version.",
            args=each_set(args),
            sort_subcommands=False,
        )
