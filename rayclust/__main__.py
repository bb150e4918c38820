"""`python -m rayclust` is the command line."""

from rayclust.cli import main

main()
