"""`python -m arvis.cli`, for torchrun and where no script was installed."""

from arvis.cli import main

if __name__ == "__main__":
    main()
