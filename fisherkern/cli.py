"""The ``fisherkern`` command: ``demo``, ``info`` and ``bench``; each loads only what it runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence


def parser() -> argparse.ArgumentParser:
    """The command line of ``fisherkern``."""
    top = argparse.ArgumentParser(
        prog="fisherkern", description="Fisher information kernels for PyTorch."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="Fisher information of a real language model on a real text",
        description="Run a language model on a text, compute the Fisher of its predictions with "
        "fisherkern and with plain PyTorch, and show what it says about the text.",
    )
    _add_demo_arguments(demo)
    commands.add_parser("info", help="which back ends are built, and why others are not")
    commands.add_parser("bench", help="run the benchmarks; options go to them", add_help=False)
    return top


def _add_demo_arguments(demo: argparse.ArgumentParser) -> None:
    from fisherkern.demo.main import add_arguments

    add_arguments(demo)


def _demo(arguments: argparse.Namespace) -> int:
    from fisherkern.demo.main import main as run

    return run(arguments)


def _forward(module: str, *arguments: list[str]) -> int:
    """Call ``main`` of a module that is imported only now; None counts as success."""
    return importlib.import_module(module).main(*arguments) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["bench"]:  # its options are its own, --help included
        return _forward("fisherkern.bench", words[1:])
    arguments = parser().parse_args(words)
    return _demo(arguments) if arguments.command == "demo" else _forward("fisherkern.info")


if __name__ == "__main__":
    sys.exit(main())
