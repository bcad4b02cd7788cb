"""Readings of an answer: the letter it means, by the official rule and by the strict one."""

import pytest
from scripted import SPAN

from evaluate import official_letter, strict_letter

OPTIONS = ["red", "green wall", "blue", "Answer"]


@pytest.mark.parametrize(
    "answer, official, strict",
    [
        ("B", "B", "B"),
        ("b", "", "B"),
        ("(c)", "", "C"),
        ("green wall", "", "B"),
        ("Answer: C", "A", "C"),
        ("The answer is C.", "C", "C"),
        ("Because of d", "B", "D"),
        ("A red wall", "A", ""),
        ("a", "", "A"),
        ("B or C", "B", ""),
        ("B, that is B", "B", "B"),
        ("it's a trap", "", ""),
        ("E", "", ""),
        ("answer", "", "D"),
        ("\n D \n", "D", "D"),
        ("option_b", "", ""),
        ("A because it hits red", "A", "A"),
        ("It hits a wall, so (c)", "", "C"),
        ("a green wall, so b", "", "B"),
        ("C. is wrong, the answer is D", "C", ""),
    ],
)
def test_letters(answer, official, strict):
    """Breaks if official is not the first of [ABCD] anywhere, or strict reads a letter out of a
    word or an article.
    """
    text = f"<reason>A B C</reason>{SPAN}<answer>{answer}</answer><answer>D</answer>"
    assert (official_letter(text), strict_letter(text, OPTIONS)) == (official, strict)


def test_an_options_text_holds_no_letter():
    """Breaks if the C of EgoSchema's texts ("C eats") is taken for the answer's letter."""
    options = ["C eats", "C runs", "a dog sits", "x", "y"]
    for answer, letter in (("The answer is A. C eats", "A"), ("b: C runs", "B"), ("C eats", "A")):
        assert strict_letter(f"<answer>{answer}</answer>", options) == letter
    assert strict_letter("<answer>A dog sits there</answer>", options) == ""
    assert strict_letter("<answer>E</answer>", options) == "E"


def test_letters_need_a_closed_answer():
    """Breaks if a letter outside the first closed <answer> counts."""
    for text in ("B", "<answer>B", "B</answer>", ""):
        assert official_letter(text) == strict_letter(text, OPTIONS) == ""
