"""`python -m clipserve` is the `clipserve` command."""

from clipserve.cli import main

if __name__ == "__main__":
    main()
