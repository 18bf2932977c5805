"""`python -m polyclinic`: the command."""

from polyclinic.cli import main

main()
