"""What the members let compete, and what held when a round closed."""

from __future__ import annotations

from data_schemas.frozen import Frozen


class Challenger(Frozen):
    """A recipe that the members let compete: the member who entered it, and the code that runs it."""

    node: str
    code_hash: str


class Terms(Frozen):
    """What held when a round closed: the champion, who had entered the round's plan, and who is owed for a recipe.

    author: the member who entered the champion's recipe, if that won its contest; permille: its part of the pot.
    """

    champion: str | None
    entrant: str | None
    author: str | None
    permille: int
