"""Which outputs are right for pictures: by names, numbers, order, and from files."""

import json

import numpy as np
import pytest

from hvit_jax import InputError
from hvit_jax.data.folder import read_folder
from hvit_jax.data.labels import Classes, Labelling, label_pictures
from tests.data.test_data import write_picture


def head(count=3, classes=()):
    return Classes(count, tuple(classes))


def folders(root, *names):
    """One picture in each class folder."""
    for name in names:
        write_picture(root / name / "a.png")
    return read_folder(root)


def flat(root, *names):
    for name in names:
        write_picture(root / name)
    return read_folder(root, labelled=False)


def by_path(labelled):
    return dict(zip(labelled.source.paths, labelled.right.tolist(), strict=True))


def test_names_decide_where_the_checkpoint_names_its_classes(tmp_path):
    source = folders(tmp_path, "ant", "cat", "dog")
    labelled = label_pictures(source, head(3, ["dog", "ant", "cat"]))
    assert by_path(labelled) == {"ant/a.png": 1, "cat/a.png": 2, "dog/a.png": 0}
    assert (labelled.by, labelled.outputs, labelled.notes) == ("names", None, ())


def test_of_a_subset_all_outputs_compete_or_those_of_the_data(tmp_path):
    source, about = folders(tmp_path, "ant", "dog"), head(4, ["dog", "bee", "ant", "cat"])
    labelled = label_pictures(source, about)
    assert by_path(labelled) == {"ant/a.png": 2, "dog/a.png": 0} and labelled.outputs is None
    assert labelled.notes == (
        "the data has 2 classes, the checkpoint's head 4; all outputs compete (with --subset only "
        "the data's)",
    )
    labelled = label_pictures(source, about, Labelling(subset=True))
    assert labelled.outputs == (0, 2)
    assert labelled.notes == ("only outputs of the data's 2 classes compete, of 4",)


def test_folders_of_numbers_are_the_labels(tmp_path):
    source = folders(tmp_path, *map(str, range(12)))
    labelled = label_pictures(source, head(12))
    assert by_path(labelled) == {f"{number}/a.png": number for number in range(12)}
    assert (labelled.by, labelled.notes) == ("numbers", ())
    named = label_pictures(source, head(12, "abcdefghijkl"))
    assert (
        by_path(named) == by_path(labelled)
        and "0 to 11 are taken as the outputs' numbers" in named.notes[0]
    )
    with pytest.raises(InputError, match="the data has 12 classes, the checkpoint's head has 13"):
        label_pictures(source, head(13))


def test_numbers_that_name_the_checkpoints_classes_are_names(tmp_path):
    """A head of this package's training, before numbers were put in their order."""
    names = ["0", "1", "10", "11", *"23456789"]
    labelled = label_pictures(folders(tmp_path, *names), head(12, names))
    assert by_path(labelled) == {f"{name}/a.png": place for place, name in enumerate(names)}


def test_folders_from_one_on_are_in_the_order_of_numbers_and_that_is_said(tmp_path):
    labelled = label_pictures(folders(tmp_path, *map(str, range(1, 11))), head(10))
    assert by_path(labelled) == {f"{number}/a.png": number - 1 for number in range(1, 11)}
    assert labelled.notes == (
        "class folders 1 to 10 go by number: 1 is the head's first output (another order: "
        "--class-map FILE)",
    )


@pytest.mark.parametrize(
    ("names", "note"),
    [
        ([*map(str, range(11)), "cat"], "10 comes before 2"),
        ([*map(str, range(2, 14))], "13 comes before 2"),
        ([f"class_{number}" for number in range(12)], "class_11 comes before class_2"),
        ([f"class_{number:02}" for number in range(12)], None),
        (["a-b", "a1", "a10", "b2"], None),
    ],
)
def test_numbers_in_names_do_not_order_them_and_that_is_said(tmp_path, names, note):
    labelled = label_pictures(folders(tmp_path, *names), head(len(names)))
    assert [*map(by_path(labelled).get, [f"{each}/a.png" for each in sorted(names)])] == [
        *range(len(names))
    ]
    said = f"class folders go by name: {note} (another order: --class-map FILE)"
    assert (labelled.by, labelled.notes) == ("order", (said,) if note else ())


def test_accents_are_the_same_however_they_are_stored(tmp_path):
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    source = folders(tmp_path / "data", "bar", decomposed)
    assert source.classes == ("bar", composed) and source.open(1).size
    assert label_pictures(source, head(2, [composed, "bar"])).right.tolist() == [1, 0]
    for name, text in (("map.csv", f"bar,0\n{composed},1\n"), ("map.json", '{"bar": 0, "%s": 1}')):
        (tmp_path / name).write_text(text.replace("%s", decomposed))
        labelling = Labelling(class_map=tmp_path / name)
        assert label_pictures(source, head(2), labelling).right.tolist() == [0, 1]


def test_without_names_classes_go_by_order(tmp_path):
    labelled = label_pictures(folders(tmp_path, "n03", "n01", "n02"), head(3))
    assert by_path(labelled) == {"n01/a.png": 0, "n02/a.png": 1, "n03/a.png": 2}
    assert (labelled.by, labelled.notes) == ("order", ())


def test_other_names_are_not_taken_in_their_order_unless_asked(tmp_path):
    source, about = folders(tmp_path, "ant", "cat", "zebra"), head(3, ["ant", "cat", "dog"])
    with pytest.raises(InputError) as raised:
        label_pictures(source, about)
    assert str(raised.value) == (
        "the data's class names are not the checkpoint's (only the data has zebra, only the "
        "checkpoint has dog); --class-map FILE says which output each folder is, --order takes "
        "both in their order"
    )
    labelled = label_pictures(source, about, Labelling(order=True))
    assert by_path(labelled) == {"ant/a.png": 0, "cat/a.png": 1, "zebra/a.png": 2}
    with pytest.raises(InputError, match="the data has 3 classes, the checkpoint's head has 4"):
        label_pictures(source, head(4), Labelling(order=True))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.json", '{"x": 2, "y": 0, "z": [1, 2], "more": 1}'),
        ("map.json", '{"x": "owl", "y": "0", "z": ["cat", "owl"]}'),
        ("map.csv", "folder,index\nx,2\ny,0\nz,1,2\n"),
        ("map.csv", "\ufeffx,owl\r\ny,dog\r\nz,cat,owl\r\n"),
    ],
)
def test_class_map(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    source = folders(tmp_path / "data", "x", "y", "z")
    labelling = Labelling(class_map=tmp_path / name)
    labelled = label_pictures(source, head(3, ["dog", "cat", "owl"]), labelling)
    assert by_path(labelled) == {"x/a.png": [2, -1], "y/a.png": [0, -1], "z/a.png": [1, 2]}
    assert labelled.by == f"the file {name}" and labelled.notes == ()


def test_a_class_map_must_have_every_folder(tmp_path):
    (tmp_path / "map.json").write_text('{"x": 2}')
    with pytest.raises(InputError, match="map.json does not have y, z; it has x$"):
        labelling = Labelling(class_map=tmp_path / "map.json")
        label_pictures(folders(tmp_path / "data", "x", "y", "z"), head(), labelling)


def test_a_class_without_a_right_output_is_left_out(tmp_path):
    (tmp_path / "map.json").write_text('{"x": [], "y": 1, "z": [0, 2]}')
    source = folders(tmp_path / "data", "x", "y", "z")
    labelled = label_pictures(source, head(), Labelling(class_map=tmp_path / "map.json"))
    assert by_path(labelled) == {"y/a.png": [1, -1], "z/a.png": [0, 2]}
    assert labelled.notes == ("left out: pictures without a right label (1)",)
    (tmp_path / "map.json").write_text('{"x": [], "y": [], "z": []}')
    with pytest.raises(InputError, match="the file map.json has no right label for any picture"):
        label_pictures(source, head(), Labelling(class_map=tmp_path / "map.json"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("val.txt", "b.png 2\na.png 0\n\n"),
        ("val.csv", "image,label\na.png,0\nb.png,2\n"),
        ("val.csv", "a.png, dog\nb.png, big owl\n"),
        ("val.txt", "a 0\nb 2\n"),
        ("val.json", '{"a.png": 0, "b.png": [2]}'),
        ("val.json", '{"a": "dog", "b": "big owl"}'),
        ("val.txt", "./a.png 0\n./b.png 2\n"),
    ],
)
def test_labels_of_flat_folders(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    source = flat(tmp_path / "data", "a.png", "b.png")
    about = head(3, ["dog", "cat", "big owl"])
    labelled = label_pictures(source, about, Labelling(labels=tmp_path / name, subset=True))
    assert by_path(labelled) == {"a.png": 0, "b.png": 2}
    assert labelled.outputs == (0, 2) and labelled.by == f"the file {name}"


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "a,1\nb,03\n"), ("a.json", '{"a": 1, "b": 3}')]
)
def test_numbers_in_files_are_names_where_all_names_are_numbers(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    source, about = flat(tmp_path / "data", "a.png", "b.png"), head(3, "123")
    labelling = Labelling(labels=tmp_path / name)
    assert by_path(label_pictures(source, about, labelling)) == {"a.png": 0, "b.png": 2}
    (tmp_path / name).write_text(text.replace("1", "0"))
    with pytest.raises(InputError, match="the label '?0'? of a is no class of the checkpoint"):
        label_pictures(source, about, labelling)


def test_several_right_labels_and_none(tmp_path):
    (tmp_path / "real.json").write_text('{"a": [2, 0, 2], "b": [], "c": 1, "d": [1]}')
    source = flat(tmp_path / "data", "a.png", "b.png", "c.png")
    labelled = label_pictures(source, head(), Labelling(labels=tmp_path / "real.json"))
    assert by_path(labelled) == {"a.png": [2, 0], "c.png": [1, -1]}
    assert labelled.right.dtype == np.int32
    assert labelled.notes == (
        "left out: pictures without a right label (1)",
        "real.json names 1 pictures that are not here",
    )


def test_the_list_of_real_is_in_the_order_of_imagenets_names(tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[1], [], [0, 2]]))
    names = [f"n01/ILSVRC2012_val_0000000{number}.JPEG" for number in (1, 2, 3)]
    source = flat(tmp_path / "data", *names)
    labelled = label_pictures(source, head(), Labelling(labels=tmp_path / "real.json"))
    assert by_path(labelled) == {names[0]: [1, -1], names[2]: [0, 2]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x/a.png,0\n", "has no label for 1 of 2 pictures: b/a.png; it has x/a.png$"),
        ("a.png,0\n", "a.png is both b/a.png and x/a.png; write their folders too"),
        ("x/a.png,0\nb/a.png,3\n", "the label 3 of b/a.png: outputs are 0 to 2"),
        ("x/a.png,0\nb/a.png,dog\n", "the label 'dog' of b/a.png is no number and no class"),
        ("x/a.png,0\nb/a.png\n", "expected NAME,LABEL in each line, got 'b/a.png'"),
        ("x/a.png,0\nx/a.png,1\n", "has two labels for x/a.png"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, text, message):
    (tmp_path / "val.csv").write_text(text)
    source = flat(tmp_path / "data", "x/a.png", "b/a.png")
    with pytest.raises(InputError, match=message):
        label_pictures(source, head(), Labelling(labels=tmp_path / "val.csv"))


def test_one_way_at_a_time(tmp_path):
    with pytest.raises(InputError, match="--class-map and --order contradict each other"):
        Labelling(class_map=tmp_path / "map.json", order=True)
