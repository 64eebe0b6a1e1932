"""A program that launches rank_program.py as two processes: `python -c LAUNCH ACTION RANK`."""

LAUNCH = (
    "import sys; from qlora.runtime import command, launcher, ranks; command.run(lambda: launcher.launch('tests.unit.rank_program', sys.argv[1:], 2))"
)
