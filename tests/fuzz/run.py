"""Fuzz: PYTHONPATH=tests python -m fuzz.run --minutes 10 [TARGET ...]

Each target runs in a process of its own for its share of the time. What breaks it is kept and named, and the exit code
is then 1. The corpus grows in --folder from run to run. atheris must be installed (`make fuzz` does that).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TARGET_NAMES = ("requests", "parser", "replies", "guides", "hosts")
RSS_MIB = 4096
INPUT_SECONDS = 20
MAX_LENGTH = 4096


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Run one target in this process, which libFuzzer then ends."""
    import atheris

    with atheris.instrument_imports(include=["indexshare"]):
        from fuzz import targets

    corpus = folder / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = folder / "words.txt"
    words.write_text(
        "".join('"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n' for word in targets.dictionary())
    )
    target: Callable[[bytes], None] = targets.TARGETS[name]
    target(targets.seeds(name)[0])  # load the model before the clock of an input runs
    options = {
        "max_total_time": seconds,
        "timeout": INPUT_SECONDS,
        "rss_limit_mb": RSS_MIB,
        "max_len": MAX_LENGTH,
        "dict": words,
        "artifact_prefix": f"{folder / name}-",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    atheris.Setup([sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)], target)
    atheris.Fuzz()


def main() -> int:
    """Parse arguments, run every target, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=[*TARGET_NAMES, []], help="default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--folder", type=Path, default=Path(sys.prefix) / "fuzz-corpus")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)  # seconds for the one target, in this process
    arguments = parser.parse_args()
    names = arguments.targets or TARGET_NAMES
    if arguments.child is not None:
        fuzz(names[0], arguments.child, arguments.folder)
        return 0
    seconds = max(1, int(arguments.minutes * 60 / len(names)))
    failed = [name for name in names if not run_child(name, seconds, arguments.folder)]
    print(f"failed: {', '.join(failed)}; inputs are in {arguments.folder}" if failed else "nothing found")
    return 1 if failed else 0


def run_child(name: str, seconds: int, folder: Path) -> bool:
    """Whether the target survived."""
    print(f"== {name}: {seconds} s", flush=True)
    command = [sys.executable, "-m", "fuzz.run", name, "--child", str(seconds), "--folder", str(folder)]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
