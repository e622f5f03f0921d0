import json

import pytest
from conftest import naming

from tnt_hf.labels import (
    describe_mismatch,
    is_counting,
    match_classes,
    may_keep_head,
    misplaced_class,
    names_in_order,
    numbers,
    read_class_names,
)


REAL = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lion"]
TEXT_ORDER = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
BY_VALUE = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
COUNTED = [f"LABEL_{k}" for k in range(12)]
WORDNET = [f"n{1440764 + 7 * k:08d}" for k in range(12)]
OTHER_WORDNET = [f"n{2440764 + 7 * k:08d}" for k in range(12)]
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
        # no folder can have a slash in its name
        (["boot", "T-shirt_top"], ["T-shirt/top", "boot"], [1, 0]),
        (["T-shirt-top"], ["T-shirt/top", "boot"], [0]),
        (["a/b", "a-b"], ["a-b", "a/b"], [1, 0]),
        (["a_b", "c"], ["a-b", "a/b", "c"], None),
        (["a-b", "a_b"], ["a/b", "c"], None),
        # names that say nothing: the order
        (REAL, COUNTED, IN_ORDER),
        (WORDNET, REAL, IN_ORDER),
        (REAL, WORDNET, IN_ORDER),
        (WORDNET, COUNTED, IN_ORDER),
        # ids that are others, or in another order; numbers of other things
        (OTHER_WORDNET, WORDNET, None),
        (WORDNET[::-1], COUNTED, None),
        (WORDNET[::-1], REAL, None),
        (REAL, WORDNET[::-1], None),
        (["boeing 707", "boeing 737"], ["airbus 707", "airbus 737", "airbus 747"], None),
        (["grade2", "grade1"], ["stage1", "stage2"], None),
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


@pytest.mark.parametrize(
    ("names", "model_names", "named", "not_named"),
    (
        (["bee", "T-shirt", "ant"], ["T-shirt/top", "ant", "bee"], ("know T-shirt,", "lack T-shirt/top."), ("ant",)),
        (["ant", "wasp"], REAL, ("2 classes", "wasp", "12", "bee, cat, dog and 8 more"), ("lack ant",)),
        ([*REAL, "wasp"], REAL, ("13 classes", "know wasp."), ("lack",)),
        (REAL[:5], [name.upper() for name in REAL[:5]], ("ant, bee, cat and 2 more", "ANT, BEE, CAT and 2 more"), ()),
        (["0", "1", "2"], COUNTED, ("only counts its 12 classes", "the 3 of the data (0, 1, 2)"), ()),
        (["ant", "crane"], ["ant", "crane", "crane"], ("know crane", "lack crane, crane"), ("ant",)),
    ),
)
def test_classes_without_a_partner_are_named_on_both_sides(names, model_names, named, not_named):
    assert match_classes(names, model_names) is None
    sentence = describe_mismatch(names, model_names)
    assert all(part in sentence for part in named) and not any(part in sentence for part in not_named), sentence


@pytest.mark.parametrize(
    ("names", "model_names", "misplaced"),
    (
        (["bee", "cat", "ant", "wasp"], ["ant", "bee", "cat", "hornet"], 0),
        (["ant", "cat", "bee", "wasp"], ["ant", "bee", "cat", "hornet"], 1),
        (["ant", "bee", "cat", "wasp"], ["ant", "bee", "cat", "hornet"], None),
        (["bee", "ant", "wasp", "fly"], ["ant", "bee", "cat", "hornet"], None),  # half of the names
        (sorted(COUNTED), COUNTED, None),
        (REAL, WORDNET, None),
    ),
)
def test_names_of_most_classes_say_that_the_order_is_another(names, model_names, misplaced):
    assert misplaced_class(names, model_names) == misplaced


def test_numbers_are_those_of_names_that_differ_in_nothing_else():
    assert numbers(["LABEL_3", "LABEL_11"]) == [3, 11] and numbers(["007", "8"]) == [7, 8]
    for names in (["a1", "b2"], ["1", "01"], ["1", "x"], ["1.5", "2.5"], ["-1", "1"]):
        assert numbers(names) is None
    assert is_counting(COUNTED) and not is_counting(TEXT_ORDER) and not is_counting(REAL)


@pytest.mark.parametrize(
    ("names", "model_names", "keeps"),
    (
        (REAL[::-1], REAL, True),
        (["boot", "T-shirt_top"], ["T-shirt/top", "boot"], True),
        (WORDNET, REAL, False),
        (WORDNET, OTHER_WORDNET, False),
        ([f"n{k:08d}" for k in range(1000)], [f"{k} things" for k in range(1000)], True),
        ([f"n{k:08d}" for k in range(1000)], [f"n{k:08d}" for k in range(1, 1001)], False),
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
    for id2label in ({1: "a", 2: "b"}, {0: "a", 2: "b"}, {"a": 0, "b": 1}, {0.5: "a"}, ["a", "b"]):
        with pytest.raises(ValueError, match="names of run"):
            names_in_order(id2label, "names of run")
    for name in (["n01440764", "tench"], None, 0.5, True):
        with pytest.raises(ValueError, match=naming("`id2label`", name)):
            names_in_order({0: name})


@pytest.mark.parametrize(
    ("content", "names"),
    (
        (["ant", "bee", "ant"], ["ant", "bee", "ant"]),
        ([7, "bee"], ["7", "bee"]),
        ({"1": "bee", "0": "ant"}, ["ant", "bee"]),
        ({str(label): f"class {label}" for label in reversed(range(12))}, [f"class {label}" for label in range(12)]),
    ),
)
def test_class_names_are_read_in_the_order_of_labels(tmp_path, content, names):
    (tmp_path / "names.json").write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_class_names(tmp_path / "names.json") == names


@pytest.mark.parametrize(
    ("content", "named"),
    (
        ("", ("JSON",)),
        ("ant\nbee\n", ("JSON",)),
        ("5", ("classes", 5)),
        ('{"0": ["n01", "ant"], "1": ["n02", "bee"]}', (["n01", "ant"], "class 0")),
        ('["ant", null]', (None, "class 1")),
        ('["ant", true]', (True, "class 1")),
        ('["ant", 0.5]', (0.5, "class 1")),
        ('{"1": "ant", "2": "bee"}', ("0 to 1", "'1', '2'", "without 0")),
        ('{"ant": 0, "bee": 1}', ("0 to 1", "'ant', 'bee'", "without 0")),
        ('{"0": "ant", "00": "bee"}', ("0 to 1", "'0', '00'", "without 1")),
    ),
)
def test_other_class_names_are_refused(tmp_path, content, named):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=naming("names.json", *named)):
        read_class_names(tmp_path / "names.json")
