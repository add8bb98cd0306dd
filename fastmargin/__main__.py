"""`python -m fastmargin` and the `fastmargin` command."""

import sys


def main() -> int:
    try:
        from fastmargin.driver.commands.cli import main as run
    except ModuleNotFoundError as missing:
        print(f"fastmargin: {missing.name} is missing; pip install 'fastmargin[train]'", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
