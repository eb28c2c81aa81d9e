"""`python -m ekgfx` is `ekgfx`."""

from ekgfx.cli import main

if __name__ == "__main__":
    main()
