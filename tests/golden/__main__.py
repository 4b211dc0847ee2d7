"""Record outputs, or compare them with what is recorded (see `tests.golden`); exits with 1 where they differ."""

import argparse
import pathlib
import sys

from tests.golden import recorded
from tests.golden.outputs import PARTS, compute


def main(args: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the file instead of comparing with it")
    parser.add_argument("--exact", action="store_true", help="bit for bit, on the machine that recorded the file")
    parser.add_argument("--file", type=pathlib.Path, default=recorded.FILE, help="where outputs are recorded")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="without it: all")
    flags = parser.parse_args(args)
    if flags.record and (flags.exact or set(flags.parts) != set(PARTS)):
        parser.error("--record writes all parts, and compares nothing")
    if not flags.record:
        expected, machine = recorded.read(flags.file)
        here = recorded.describe_machine()
        other = [name for name in here if here[name] != machine.get(name)]
        if flags.exact and other:
            parser.error(
                f"{flags.file} was recorded with another {', '.join(other)}, so its bits say nothing here; "
                "record a file of your own at the commit to compare with (--record --file F)"
            )
    outputs = {}
    for part in flags.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        outputs |= compute(part)
    if flags.record:
        recorded.write(outputs, flags.file)
        print(f"recorded {len(outputs)} outputs in {flags.file} ({flags.file.stat().st_size / 1024:.0f} KiB)")
        return 0
    expected = {name: array for name, array in expected.items() if name.split("/")[0] in flags.parts}
    lines = recorded.compare(outputs, expected, flags.exact)
    print("\n".join(lines) or f"{len(outputs)} outputs are as recorded{', bit for bit' if flags.exact else ''}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
