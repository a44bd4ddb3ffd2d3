"""Texts as a policy may write them while it is trained."""

ODD = (
    "apple",
    "Apple, apple, apple.",
    "Apple apple and apple dog dog",
    ".",
    "...",
    "\n\n",
    "- \n- ",
    "# Answer",
    "**",
    "*a* `b` **c**",
    "😊😊😊",
    "I think, I think, I think",
    "Perhaps",
    "What a great question!",
    "What a great question! " * 20,
    "anchor anchor apple apple",
    "1. Apple\n2. Pear\n3. Plum",
    "é ü 漢字 \u200b \x00",
    "a" * 500,
    "the " * 100,
)
