"""How texts become the study's tasks, and the prepared weights matrices again."""

from __future__ import annotations

import numpy as np

from benchmarks.quality import texts
from benchmarks.quality.language import dequantize


def test_parts_hold_groups_together_and_have_their_shares():
    found = texts.parts(f"document {i}" for i in range(6400))
    assert np.abs(np.bincount(found) / 6400 - np.array([15, 6, 11]) / 32).max() < 0.02
    assert texts.part_of("a") == texts.part_of("a")


def test_swaps():
    sentences = [f"the quick brown fox number {w} jumps over a lazy dog." for w in ("one", "two", "three", "four")]
    documents = [" ".join(sentences), "Too short.", "1 2 3 4 5 6 7 8 9."]
    found = texts.swaps(documents)
    assert len(found) == 4 and {e.group for e in found} == {documents[0]}
    for example in found:
        moved = example.text not in sentences
        assert moved == bool(example.label)
        if moved:
            original = next(s for s in sentences if sorted(s.split()) == sorted(example.text.split()))
            places = [i for i, (a, b) in enumerate(zip(original.split(), example.text.split(), strict=True)) if a != b]
            assert len(places) == 2 and places[1] - places[0] == 1 and places[0] > 0
    many = texts.swaps(
        [f"the quick brown fox named {'abcdefgh'[i % 8]} {chr(97 + i // 8)} jumps over dogs." for i in range(200)]
    )
    assert 70 < sum(e.label for e in many) < 130


def test_ratings_signs_and_classes():
    ratings = texts.rated(b"1\t-2.5\tbad\n2\t0\tso so\n3\t1.5\tgood \n4\t1\tgood\nbroken line\n")
    assert ratings == {"bad": -2.5, "so so": 0.0, "good": 1.0}
    assert [(e.text, e.label) for e in texts.signs(ratings)] == [("bad", 0.0), ("good", 1.0)]
    found = texts.classes(b'sentiment,confidence,text\npositive,1,fine\nnegative,1,"so, so"\n')
    assert [(e.text, e.label) for e in found] == [("fine", 1.0), ("so, so", 0.0)]


def test_sums_are_right_and_distinct():
    found = texts.sums(50)
    assert len({question for question, _ in found}) == 50
    for question, answer in found:
        a, b = (int(word.strip("?")) for word in question.split() if word.strip("?").isdigit())
        assert answer == f" {a + b}."


def test_blocks_of_weights_are_decoded():
    """Q4_1: scale, minimum, 16 bytes whose low nibbles come first. Q8_0: scale, 32 signed bytes."""
    scale, minimum = np.array([0.5], np.float16).tobytes(), np.array([-2.0], np.float16).tobytes()
    nibbles = np.arange(32) % 16
    packed = (nibbles[:16] | nibbles[16:] << 4).astype(np.uint8).tobytes()
    raw = np.frombuffer(scale + minimum + packed, np.uint8)[None]
    assert dequantize(raw, 20).tolist() == [(0.5 * nibbles - 2).tolist()]
    values = np.arange(-16, 16).astype(np.int8)
    raw = np.frombuffer(scale + values.tobytes(), np.uint8)[None]
    assert dequantize(raw, 34).tolist() == [(0.5 * values).tolist()]
