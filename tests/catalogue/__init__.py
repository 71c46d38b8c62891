"""The table of losses: a row per loss, with its data and another computation of it."""

from catalogue import binary, classes, combinators, embedding, values

CASES = {
    **binary.CASES,
    **classes.CASES,
    **combinators.CASES,
    **embedding.CASES,
    **values.CASES,
}
