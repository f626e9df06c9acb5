import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest
from PIL import Image

import hvit_jax
from hvit_jax import InputError, demo
from hvit_jax.browser.page import example_pictures, make_page
from hvit_jax.browser.session import KEPT_MODELS, Session
from hvit_jax.commands.demo import main
from hvit_jax.config import Decoder, ViTConfig
from hvit_jax.costs import at_cost
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.pictures import Preprocessing
from tests.evaluation_setup import make_checkpoint
from tests.small_models import with_registers

gradio = pytest.importorskip("gradio", reason="needs gradio (the extra demo)")


@pytest.fixture(scope="module")
def session():
    return Session(str(demo.checkpoint_dir()))


@pytest.fixture(scope="module")
def picture():
    return Image.open(next(demo.images_dir().glob("8-*/*.png")))


def test_answers_with_predictions_groups_and_speed(session, picture):
    answer = session.answer(picture, "hourglass", 0.6, 5)
    assert answer.groups.shape == answer.attention.shape == (616, 616, 3)
    assert next(iter(answer.reduced)).startswith("8") and next(iter(answer.dense)).startswith("8")
    assert 0.5 < sum(answer.reduced.values()) <= 1.0001
    setting = "**Setting:** `hourglass cluster_location=2 num_clusters=64`\n"
    assert answer.summary.startswith(setting)
    assert "| tokens after block 5 | 197 | 65 |" in answer.summary
    assert "| GFLOPs | 1.00 x | 0.61 x |" in answer.summary


def test_keeps_a_few_models_only(session):
    for share in np.linspace(0.4, 0.9, KEPT_MODELS + 2):
        session._model(at_cost("evit", session.config, float(share)))
    assert session._model.cache_info().currsize == KEPT_MODELS


def test_a_model_without_classes_or_head(tmp_path, small_config, picture):
    for classes, config in ((5, small_config), (0, with_registers(small_config))):
        here = Session(make_checkpoint(tmp_path / str(classes), config))
        answer = here.answer(picture, "dense", 1.0, 1)
        assert ("5 classes, whose names" if classes else "no classification head") in here.about
        assert len(answer.reduced) == min(3, classes)
        assert set(answer.reduced) <= {f"class {index}" for index in range(classes)}
        assert ("| cosine to the dense feature | 1.00 | 1.000 |" in answer.summary) is (
            classes == 0
        )
        tokens = config.num_tokens
        assert f"| tokens after block 1 | {tokens} | {tokens} |" in answer.summary
    assert tokens == 6 * 8 + 1 + 3


def test_a_model_of_maps_shows_them(tmp_path, picture):
    config = ViTConfig(32, 8, 2, 16, 2, 32, num_classes=0, decoder=Decoder("linear", 3))
    here = Session(make_checkpoint(tmp_path / "maps", config))
    answer = here.answer(picture, "dense", 1.0, 1)
    assert "It makes a map of every picture: segmentation." in here.about
    titles = [title for _, title in answer.maps]
    assert titles == ["map, dense", "map, dense", "they differ: 0.0 % of pixels"]
    assert {drawing.shape for drawing, _ in answer.maps} == {answer.groups.shape}
    assert answer.dense == {} and "cosine" not in answer.summary


def test_says_what_the_model_knows(session):
    assert "56 x 56 pixels, 14 x 14 patches" in session.about
    assert "10 classes: 0-t-shirt, 1-trouser, " in session.about
    assert "9-ankle-boot. It names one" in session.about


def test_says_which_method_the_model_was_trained_with(tmp_path, session):
    evit = hvit_jax.make_reducer("evit", drop_locations=(1,))
    trained = Session(make_checkpoint(tmp_path / "checkpoint", trained=evit))
    assert "patches, trained with evit. It knows" in trained.about
    assert "trained with" not in session.about


def test_asks_for_a_picture_and_says_what_is_wrong_in_words(session, picture, tmp_path):
    (ask,) = (fn.fn for fn in make_page(session).fns.values() if fn.api_name == "answer")
    *nothing, text = ask(None, "tome", 60, 5)
    assert nothing == [None] * 5 and text.startswith("**Choose a picture first:**")
    *nothing, text = ask(picture.filename, "tome", 60, 6)
    assert nothing == [None] * 5 and "blocks are 0 to 5" in text
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a.tif")
    *nothing, text = ask(str(tmp_path / "a.tif"), "tome", 60, 5)
    assert nothing == [None] * 5 and "a.tif: its pixels are floating-point numbers" in text


def test_sixteen_bits_of_grey_and_pictures_on_their_side(session, picture, tmp_path):
    """Seen as the same picture with 8 bits, and upright."""
    (ask,) = (fn.fn for fn in make_page(session).fns.values() if fn.api_name == "answer")
    grey, exif = picture.convert("L"), Image.Exif()
    exif[0x0112] = 8
    deep = np.asarray(grey.transpose(Image.Transpose.ROTATE_270)).astype(np.uint16) << 8
    grey.save(tmp_path / "plain.png")
    Image.fromarray(deep).save(tmp_path / "deep.png", exif=exif)
    plain, same = (ask(tmp_path / name, "tome", 60, 5) for name in ("plain.png", "deep.png"))
    np.testing.assert_array_equal(same[0], plain[0])
    assert same[2] == plain[2] and same[3] == plain[3]


def test_pictures_are_prepared_as_the_checkpoint_says(tmp_path, small_config, picture):
    own = Preprocessing(crop_mode="squash", mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config, preprocessing=own)
    found = Session(checkpoint).answer(picture, "dense", 1.0, 1)
    pixels = resize_and_crop(picture, small_config.image_shape, own)[None]
    logits = hvit_jax.load(checkpoint)(normalize(pixels, own.mean, own.std))[0]
    shares = np.asarray(jax.nn.softmax(logits))
    expected = {f"class {index}": shares[index] for index in np.argsort(-shares)[:3]}
    assert found.dense == pytest.approx(expected, abs=1e-6) == found.reduced


def test_says_what_is_wrong(session, picture):
    with pytest.raises(InputError, match="0 to 5"):
        session.answer(picture, "tome", 0.6, 6)
    with pytest.raises(InputError, match="above 0"):
        session.answer(picture, "tome", 0.0, 5)


def test_the_page_offers_pictures_that_exist(session):
    assert len(example_pictures()) == 7 and all(path.is_file() for path in example_pictures())
    page = make_page(session)
    assert {"answer"} <= {fn.api_name for fn in page.fns.values()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "0"], "--port must be at least 1 and at most 65535, got 0"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["-r", "57"], "57 is not a multiple of the patch size 4"),
        (["--host", "no.such.host.invalid"], "cannot serve on no.such.host.invalid:7860"),
    ],
)
def test_mistakes_are_one_line(capfd, arguments, message):
    assert main(arguments) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_refuses_a_port_in_use(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["--port", str(other.getsockname()[1])]) == 2
    assert "choose another --port" in capfd.readouterr().err


@pytest.fixture(scope="module")
def address():
    """A running `hvit demo`, which Ctrl-C ends in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hvit_jax", "demo", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and b"open http" in process.stdout.readline()
            yield f"http://127.0.0.1:{port}"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 0 and b"Traceback" not in errors
        finally:
            process.kill()


def test_serves_the_page_and_answers(address):
    from gradio_client import Client, handle_file

    with urllib.request.urlopen(address) as page:
        text = page.read().decode()
    assert "fonts.googleapis.com" not in text
    picture = str(next(demo.images_dir().glob("1-*/*.png")))
    client = Client(address, verbose=False, analytics_enabled=False)
    *_, dense, _, summary = client.predict(handle_file(picture), "evo", 70, 5, api_name="/answer")
    assert dense["label"] == "1-trouser" and "| evo |" in summary


def test_in_a_browser(address, tmp_path):
    """Choose an example and a method, press the button, and see the answer."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (the extra dev)")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        failed = []
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(str(example_pictures()[-1]))
        page.get_by_role("button", name="Run").click()
        page.get_by_text("One picture at a time").wait_for(timeout=60_000)
        time.sleep(1)
        page.screenshot(path=tmp_path / "page.png")
        assert page.get_by_text("tokens after block 5").is_visible()
        assert page.locator("img").count() >= 3
        assert not [url for url in failed if not url.startswith(address)]
        browser.close()
