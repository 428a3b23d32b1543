"""`python -m ranvier.cli`."""

from ranvier.cli import main

if __name__ == "__main__":
    main()
