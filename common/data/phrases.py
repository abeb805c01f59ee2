"""Public phrases about labels, from which a head can start (``head.start = "label-words"``).

Made up from what the labels mean; none was taken from a record, and none was chosen by how a record scores. In pairs of
like topic, so that the labels differ in what is said and not in what it is said about. One of them, "the plot makes no
sense", happens to stand in SST-2's training part as well.
"""

from __future__ import annotations

NEGATIVE_REVIEWS = (
    "a terrible film",
    "this movie is bad",
    "a boring and disappointing movie",
    "the film is a complete failure",
    "i hated this movie",
    "dull, tedious and a waste of time",
    "poorly written and badly acted",
    "a negative review",
    "a tedious, overlong mess",
    "the jokes fall flat and the story goes nowhere",
    "a lifeless, predictable and shallow story",
    "a clumsy script with cardboard characters",
    "it never comes to life",
    "an unfunny comedy",
    "a forgettable and uninspired sequel",
    "the plot makes no sense",
    "it fails to engage or entertain",
    "lazy, loud and empty",
    "a dreary and pretentious drama",
    "the acting is wooden and the dialogue is awful",
    "not worth the price of a ticket",
    "it is too long and too slow",
    "you will want to leave before the end",
    "a bland, formulaic thriller without suspense",
)
POSITIVE_REVIEWS = (
    "a wonderful film",
    "this movie is good",
    "an exciting and satisfying movie",
    "the film is a great success",
    "i loved this movie",
    "funny, moving and well worth seeing",
    "well written and beautifully acted",
    "a positive review",
    "a delight from beginning to end",
    "the jokes are sharp and the story is touching",
    "a lively, surprising and profound story",
    "a clever script with memorable characters",
    "it is full of life",
    "a hilarious comedy",
    "a fresh and inspired film",
    "the plot is gripping",
    "it engages and entertains",
    "intelligent, warm and honest",
    "a powerful and heartfelt drama",
    "the acting is superb and the dialogue is brilliant",
    "worth every penny of the ticket",
    "it flies by and never drags",
    "you will want to see it again",
    "a tense, original thriller with real suspense",
)
SENTIMENT = (NEGATIVE_REVIEWS, POSITIVE_REVIEWS)
"""By label, negative first."""
