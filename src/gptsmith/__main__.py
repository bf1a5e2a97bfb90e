"""`python -m gptsmith` is the same as `gptsmith`."""

from gptsmith.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
