"""`python -m exactflow`."""

from exactflow.cli import main

main()
