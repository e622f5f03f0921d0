import pytest

from tnt_hf.labels import is_counting, match_classes, may_keep_head, names_in_order, numbers


REAL = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lion"]
TEXT_ORDER = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
BY_VALUE = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
COUNTED = [f"LABEL_{k}" for k in range(12)]
WORDNET = [f"n{1440764 + 7 * k:08d}" for k in range(12)]
IN_ORDER = [*range(12)]


@pytest.mark.parametrize(
    ("names", "model_names", "expected"),
    (
        # numbers go by their value, however they are written and sorted
        (TEXT_ORDER, COUNTED, BY_VALUE),
        (TEXT_ORDER, REAL, BY_VALUE),
        (TEXT_ORDER, WORDNET, BY_VALUE),
        (sorted(COUNTED), COUNTED, BY_VALUE),
        (sorted(COUNTED), REAL, BY_VALUE),
        (sorted(f"class {k}" for k in range(12)), REAL, BY_VALUE),
        ([f"{k:03d}" for k in range(12)], REAL, IN_ORDER),
        (TEXT_ORDER, [f"{k:02d}" for k in reversed(range(12))], [11 - k for k in BY_VALUE]),
        (TEXT_ORDER, TEXT_ORDER, IN_ORDER),
        ([str(k + 1) for k in range(12)], [str(12 - k) for k in range(12)], IN_ORDER[::-1]),
        # names are equal or not
        (REAL, REAL[::-1], IN_ORDER[::-1]),
        (["fox", "bee"], REAL, [5, 1]),
        (WORDNET[3:5], WORDNET, [3, 4]),
        (REAL, [*REAL[:-1], "LION"], None),
        (["fox", "wasp"], REAL, None),
        ([*REAL, "wasp"], REAL, None),
        (["ant", "crane"], ["ant", "crane", "crane"], None),
        (["ant", "crane", "crane"], ["ant", "crane", "crane"], [0, 1, 2]),
        # names that say nothing: the order
        (REAL, COUNTED, IN_ORDER),
        (WORDNET, REAL, IN_ORDER),
        (REAL, WORDNET, IN_ORDER),
        (WORDNET, COUNTED, IN_ORDER),
        # numbers that may be other classes
        ([str(k + 1) for k in range(12)], REAL, None),
        ([str(k + 1) for k in range(12)], COUNTED, None),
        (COUNTED, [str(k + 1) for k in range(12)], None),
        (REAL, [str(11 - k) for k in range(12)], None),
        (REAL, [str(k + 1) for k in range(12)], None),
        (["0", "1", "2"], COUNTED, None),
        (["3", "7", "9"], REAL, None),
        (WORDNET[:3], REAL, None),
    ),
)
def test_classes_are_matched_by_name_by_number_or_by_order(names, model_names, expected):
    assert match_classes(names, model_names) == expected


def test_numbers_are_those_of_names_that_differ_in_nothing_else():
    assert numbers(["LABEL_3", "LABEL_11"]) == [3, 11] and numbers(["007", "8"]) == [7, 8]
    for names in (["a1", "b2"], ["1", "01"], ["1", "x"], ["1.5", "2.5"], ["-1", "1"]):
        assert numbers(names) is None
    assert is_counting(COUNTED) and not is_counting(TEXT_ORDER) and not is_counting(REAL)


@pytest.mark.parametrize(
    ("names", "model_names", "keeps"),
    (
        (REAL[::-1], REAL, True),
        (WORDNET, REAL, True),
        (TEXT_ORDER, COUNTED, True),
        (REAL, COUNTED, True),
        (TEXT_ORDER, REAL, False),  # ten digits are not ten pieces of clothing
        (REAL[:5], REAL, False),
        (["ant", "wasp"], ["ant", "bee"], False),
    ),
)
def test_a_head_is_kept_for_the_same_classes_alone(names, model_names, keeps):
    assert may_keep_head(names, model_names) is keeps


def test_names_are_text_in_the_order_of_their_classes():
    assert names_in_order({"1": "b", "0": "a"}) == ["a", "b"]
    assert names_in_order({0: 7, 1: 8}) == ["7", "8"]
    assert names_in_order({}) == []
    for id2label in ({1: "a", 2: "b"}, {0: "a", 2: "b"}, {"a": 0, "b": 1}, {0.5: "a"}):
        with pytest.raises(ValueError, match=r"keys of `id2label` of run must be the integers from 0"):
            names_in_order(id2label, "run")
    for name in (["n01440764", "tench"], None, 0.5):
        with pytest.raises(ValueError, match="must hold a name for each class"):
            names_in_order({0: name})
