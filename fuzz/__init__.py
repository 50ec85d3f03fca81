"""Fuzzing: everything that a guest or a peer can say, tried by the million.

Each module in `fuzz.targets` is one target: a function ``run(data)`` that takes any bytes, makes a
hostile guest or peer out of them, and raises when a rule was broken. It never raises for input that
is merely bad: what a target lets through as expected (`DriverError` and its like) it names.

``python -m fuzz`` runs them coverage-guided, with atheris (``pip install -e '.[fuzz]'``):

    python -m fuzz --seconds 10            all of them, ten seconds each
    python -m fuzz ring --seconds 3600     one of them, for an hour
    python -m fuzz ring --replay FILE      what a finding does, without atheris
    python -m fuzz ring --keep DIRECTORY   adds what DIRECTORY has of new coverage to the corpus

The corpus (`fuzz/corpus/NAME.hex`, one input a line) goes through every target in the ordinary
tests, too. What is found becomes a named test in tests/test_fuzz_finds.py, with its story.

A new target is a new module in `fuzz.targets` with a docstring, and a corpus of a line or two.
"""
