"""A bug to plant: one row of the tables beside this file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str  # found exactly once
    new: str
    tests: str  # pytest arguments
    module: str = ""  # that the tests need; "": the one the file belongs to
