"""`python -m sparc3`, as torchrun needs it."""

from .cli.main import main

if __name__ == "__main__":
    main()
