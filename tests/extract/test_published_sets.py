"""Image sets as `datasets` and `webdataset` write them: extracted, killed, resumed, and probed."""

import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from extracting import contents
from killing import Driver, assert_whole
from published_sets import CAPTION, pictures, write_datasets, write_webdataset

import stellar_fast
from stellar_fast.extract import make_job, run
from stellar_fast.recipes import probe
from stellar_fast.recipes.labels import named_labels

COUNT = 60
OPTIONS = {"partition_size": 16, "batch_size": 4}
WRITERS = {"datasets": write_datasets, "webdataset": write_webdataset}
KEEP = {"datasets": ["caption", "label"], "webdataset": ["caption", "cls"]}


@pytest.fixture(scope="module")
def images():
    return pictures(COUNT)


@pytest.fixture(scope="module", params=WRITERS)
def made(request, images, tmp_path_factory, engine):
    """The set, and an output of it that was made in one go."""
    root = tmp_path_factory.mktemp(request.param)
    source = WRITERS[request.param](root / "set", *images)
    run(make_job(source, root / "out", keep=KEEP[request.param], **OPTIONS), engine)
    return request.param, source, root / "out"


def test_labels_are_those_of_their_images(made, images, engine):
    """Each row is what the engine gives for the picture that the label was written with."""
    kind, _, output = made
    pixels, labels = images
    features = stellar_fast.open_features(output)
    name = KEEP[kind][-1]
    assert features.columns[name].tolist() == labels
    assert features.columns[name].dtype == np.int64
    assert features.columns["caption"].tolist() == [
        CAPTION.format(label, at) for at, label in enumerate(labels)
    ]
    expected = engine.encode(pixels, outputs=("cls",))["cls"].numpy()
    found = features["cls"].to_numpy()
    if kind == "datasets":  # PNG: the same pixels
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    distances = np.linalg.norm(found - expected.transpose(1, 0, 2), axis=2)
    assert distances.argmin(axis=1).tolist() == list(range(COUNT))


def test_the_probe_has_the_accuracy_of_a_join_by_hand(made, images):
    """The join is by the number in each caption, read of the index alone, and the labels that the
    pictures were drawn with."""
    kind, _, output = made
    _, labels = images
    features = stellar_fast.open_features(output)
    vectors = probe.pooled(features)
    order = [int(line.rpartition(" ")[2]) for line in features.index["caption"].to_pylist()]
    by_hand = np.array([labels[number] for number in order])
    by_name = named_labels(features, KEEP[kind][-1])
    accuracy = []
    for chosen in (by_hand, by_name):
        model = probe.linear_probe(vectors[:40], chosen[:40])
        accuracy.append(model.score(vectors[40:], chosen[40:]))
    assert accuracy[0] == accuracy[1]


@pytest.mark.parametrize("kills", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_is_resumed_byte_for_byte(made, tmp_path, kills):
    kind, source, output = made
    expected = contents(output)
    options = {"keep": KEEP[kind], **OPTIONS}
    rng = random.Random(0)
    killed = 0
    target = tmp_path / "out"
    driver = Driver(source, options)
    try:
        while killed < kills:
            # By the clock, or at a step of what puts files on the disk.
            moment = {"step": rng.randrange(1, 20)}
            if rng.random() < 0.5:
                moment = {"kill_after": rng.uniform(0.5, 3)}
            code = driver.extract(target, **moment)
            assert code in (0, -signal.SIGKILL)
            assert_whole(target, expected)
            killed += code != 0
            if code == 0:
                assert contents(target) == expected
                shutil.rmtree(target)
        assert driver.extract(target) == 0
        assert contents(target) == expected
    finally:
        driver.close()


def test_a_set_is_read_from_its_folder_by_a_pattern_alone(made):
    _, source, _ = made
    folder = str(Path(source).parent)
    if source.endswith(".parquet"):
        with pytest.raises(ValueError, match=r"no images in this folder.*\*\*/\*\.parquet"):
            make_job(folder, f"{folder}-out")
