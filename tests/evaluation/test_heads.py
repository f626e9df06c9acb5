"""Heads of models that have none: votes, logistic regression and texts, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvit_jax.distributed.placement import place
from hvit_jax.errors import InputError
from hvit_jax.evaluation.heads import Linear, Neighbours, in_chunks
from hvit_jax.evaluation.logistic import fit_logistic
from hvit_jax.evaluation.step import compare
from hvit_jax.evaluation.texts import read_text_embeddings


def test_votes_by_hand():
    """Cosines 0.6, 0.8, 0 and -1 with (1, 0): the three nearest vote, whatever their lengths."""
    training = np.array([[3, 4], [8, 6], [0, 5], [-1, 0]], np.float32)
    head = Neighbours.of_training(training, np.array([0, 2, 2, 1], np.int32), classes=4, k=3)
    weights = np.exp(np.array([0.6, 0.8, 0.0]) / 0.07)
    wanted = np.array([[weights[0], 0, weights[1] + weights[2], 0]]) / weights.sum()
    found = head(jnp.array([[7.0, 0]]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-12)


def test_chunks_do_not_change_the_votes():
    random = np.random.default_rng(0)
    training, queries = random.normal(size=(50, 4)), random.normal(size=(6, 4))
    labels = random.integers(0, 3, 50).astype(np.int32)
    whole = Neighbours.of_training(training.astype(np.float32), labels, classes=3, k=5)
    pieces = whole.features.reshape(50, 4), whole.labels.ravel()
    filled = np.pad(pieces[0], ((0, 6), (0, 0))), np.pad(pieces[1], (0, 6), constant_values=-1)
    cut = Neighbours(filled[0].reshape(8, 7, 4), filled[1].reshape(8, 7), 3, 5)
    queries = jnp.asarray(queries, jnp.float32)
    np.testing.assert_allclose(cut(queries), whole(queries), rtol=1e-5)
    unit = queries / jnp.linalg.norm(queries, axis=1, keepdims=True)
    cosines, _ = cut.nearest(unit)
    np.testing.assert_allclose(cosines, -np.sort(-np.asarray(unit) @ pieces[0].T)[:, :5], atol=1e-6)


def test_chunks_are_filled_up():
    features, labels = in_chunks(np.ones((3, 2), np.float32), np.array([0, 1, 2]), multiple=4)
    assert features.shape == (1, 4, 2) and features[0, 3].tolist() == [0, 0]
    assert labels.tolist() == [[0, 1, 2, -1]]


def test_classes_without_votes_are_never_right():
    shares = jnp.array([[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]])
    outputs = compare(shares, jnp.array([0, 0]), {}, votes=True)
    assert outputs.correct.tolist() == [False, False] and outputs.top1.tolist() == [1, 2]
    assert outputs.correct_top5.tolist() == [False, True]
    assert np.isnan(outputs.loss).all() and outputs.finite.all()


def test_logistic_regression_by_hand():
    """Of two classes at -1 and 1 the slope `a` solves `decay * a = 1 / (1 + exp(2 a))`."""
    features = np.array([[-1.0], [1.0]] * 4, np.float32)
    labels = np.array([0, 1] * 4, np.int32)
    fit = fit_logistic(features, labels, 2, place(), weight_decay=1 / (1 + np.exp(2.0)))
    np.testing.assert_allclose(fit.head.kernel, [[-1, 1]], atol=1e-3)
    np.testing.assert_allclose(fit.head.bias, [0, 0], atol=1e-3)
    assert fit.loss == pytest.approx(np.log1p(np.exp(-2.0)), abs=1e-3)


@pytest.fixture(scope="module")
def clusters():
    """Three classes that overlap, of features with means and deviations far from 0 and 1."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 100).astype(np.int32)
    centres = random.normal(size=(3, 20))
    noise = 3 * random.normal(size=(100, 20))
    features = (centres[labels] + noise) * np.tile([0.1, 1, 10, 1], 5) + 7
    return features.astype(np.float32), labels


def test_logistic_regression_finds_the_minimum(clusters):
    """The gradient with respect to the kernel for standardised features, in float64."""
    features, labels = (each[:90] for each in clusters)  # As many as when ten are held out.
    fit = fit_logistic(features, labels, 3, place(), weight_decay=0.01)
    assert fit.weight_decay == 0.01 and 1 < fit.steps < 100
    mean, deviation = features.mean(0, dtype=float), features.std(0, dtype=float)
    scaled = (features - mean) / deviation
    kernel = np.asarray(fit.head.kernel, float) * deviation[:, None]
    logits = scaled @ kernel + fit.head.bias + mean @ np.asarray(fit.head.kernel, float)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    errors = (shares - np.eye(3)[labels]) / len(labels)
    assert np.abs(scaled.T @ errors + 0.01 * kernel).max() < 5e-4
    assert np.abs(errors.sum(0)).max() < 5e-4
    assert fit.loss == pytest.approx(-np.log(shares[np.arange(90), labels]).mean(), rel=1e-3)


def test_the_weight_decay_is_chosen_where_none_is_given(clusters):
    features, labels = clusters
    fit = fit_logistic(features, labels, 3, place())
    held = np.arange(100) % 10 == 0

    def held_out_loss(weight_decay):
        part = fit_logistic(features[~held], labels[~held], 3, place(), weight_decay=weight_decay)
        logits = part.head(jnp.asarray(features[held]))
        return float(compare(logits, jnp.asarray(labels[held]), {}).loss.mean())

    assert fit.weight_decay in (1e-1, 1e-2)
    at_best = held_out_loss(fit.weight_decay)
    assert at_best < held_out_loss(10 * fit.weight_decay)
    assert at_best < held_out_loss(fit.weight_decay / 10)
    again = fit_logistic(features, labels, 3, place(), weight_decay=fit.weight_decay)
    np.testing.assert_array_equal(again.head.kernel, fit.head.kernel)


def test_too_few_pictures_to_choose_by():
    features, labels = np.zeros((9, 1), np.float32), np.zeros(9, np.int32)
    with pytest.raises(InputError, match="9 training pictures are too few.*--probe-weight-decay X"):
        fit_logistic(features, labels, 2, place())


def write_texts(path, **arrays):
    default = {"embeddings": np.eye(2, 3, dtype=np.float32), "classes": np.array(["a", "b"])}
    arrays = {name: value for name, value in {**default, **arrays}.items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_zero_shot_by_hand(tmp_path):
    """Cosines 0.6 and 0.8 of the picture with the texts, times 10, plus 1."""
    texts = np.array([[2.0, 0, 0], [0, 0.5, 0]])
    path = write_texts(tmp_path / "t.npz", embeddings=texts, logit_scale=10.0, logit_bias=1.0)
    read = read_text_embeddings(path)
    assert read.classes == ("a", "b")
    found = jax.jit(lambda head, x: head(x))(read.head, jnp.array([[3.0, 4, 0]]))
    np.testing.assert_allclose(found, [[7, 9]], rtol=1e-6)
    plain = read_text_embeddings(write_texts(tmp_path / "p.npz")).head
    assert isinstance(plain, Linear)
    np.testing.assert_allclose(plain(jnp.array([[3.0, 4, 0]])), [[60, 80]], rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        ({"classes": None}, "has no classes; an .npz file of text embeddings holds"),
        ({"classes": np.array(["a"])}, "shape (2, 3) and classes of shape (1,)"),
        ({"classes": np.array([0, 1])}, "type int64"),
        ({"classes": np.array(["a", None])}, "cannot be read (Object arrays"),
        ({"classes": np.array(["a", "a"])}, "has the class 'a' more than once"),
        ({"embeddings": np.zeros((2, 3))}, "all zeros"),
        ({"embeddings": np.full((2, 3), np.nan)}, "no finite number"),
        ({"logit_scale": -4.6}, "logit_scale is -4.6; it is a factor above 0"),
        ({"logit_bias": np.zeros(2)}, "logit_bias is one number"),
    ],
)
def test_wrong_files_of_texts(tmp_path, arrays, part):
    with pytest.raises(InputError) as error:
        read_text_embeddings(write_texts(tmp_path / "t.npz", **arrays))
    assert part in str(error.value)


def test_no_files_of_texts(tmp_path):
    with pytest.raises(InputError, match="cannot read .*No such file"):
        read_text_embeddings(tmp_path / "missing.npz")
    (tmp_path / "t.npz").write_bytes(b"text")
    with pytest.raises(InputError, match="t.npz cannot be read"):
        read_text_embeddings(tmp_path / "t.npz")
    with open(tmp_path / "t.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="t.npz cannot be read"):
        read_text_embeddings(tmp_path / "t.npz")
