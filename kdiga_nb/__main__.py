"""``python -m kdiga_nb``, which is what torchrun starts: the command ``kdiga``."""

from kdiga_nb.cli import main

if __name__ == "__main__":
    main()
