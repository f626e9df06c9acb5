"""The page of the browser demo, and how it is served."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvit_jax import demo
from hvit_jax.browser.config import DemoConfig
from hvit_jax.browser.session import Session
from hvit_jax.data.picture import open_picture
from hvit_jax.errors import InputError, import_optional
from hvit_jax.reducers import REDUCERS, Reducer
from hvit_jax.system.programs import use_compilation_cache
from hvit_jax.visualization.view import whose_attention

TITLE = "hvit_jax: token reduction"
_ABOUT = """# Token reduction in vision transformers
Drop in a picture, choose a method and how much of the dense model's work it may do. The first time
a setting is used it is compiled, which takes some seconds."""


def serve(config: DemoConfig) -> None:
    """Serve the page until Ctrl-C."""
    # Before gradio is imported: it asks the network for news otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gradio = import_optional("gradio", "this needs gradio: pip install 'hvit-jax[demo]'")
    use_compilation_cache(config.cache)
    session = Session(config.folder, config.resolution)
    _check_address(config.host, config.port)
    page = make_page(session)
    page.launch(
        server_name=config.host,
        server_port=config.port,
        # Fonts of the system, where gradio's own would be fetched.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        share=False,
        ssr_mode=False,
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
    )
    print(f"open http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be served, before gradio looks for others."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(
            f"cannot serve on {host}:{port}: {error.strerror or error}; choose another --port or "
            "--host"
        ) from error


def make_page(session: Session) -> Any:
    """Lay out the page, a `gradio.Blocks` to be launched."""
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"{_ABOUT}\n\n{session.about}")
        with gr.Row():
            with gr.Column():
                questions, button = _questions(gr, last_block=session.config.depth - 1)
            with gr.Column():
                pictures = [
                    gr.Image(label="groups of patches", interactive=False, format="png"),
                    gr.Image(label=whose_attention(session.config), interactive=False),
                ]
            with gr.Column():
                has_head = session.config.num_classes > 0
                reduced = gr.Label(label="prediction under the method", visible=has_head)
                dense = gr.Label(label="prediction of the dense model", visible=has_head)
                makes_maps = session.config.decoder is not None
                maps = gr.Gallery(label="maps", visible=makes_maps, columns=3, interactive=False)
                answers = [*pictures, reduced, dense, maps, gr.Markdown(label="setting and speed")]
        button.click(_answer_with(session), questions, answers, api_name="answer")
    return page


def _questions(gr: Any, *, last_block: int) -> tuple[list[Any], Any]:
    """Lay out what a visitor chooses, and the button."""
    methods = [name for name in REDUCERS if name != Reducer.name]
    # As a file, because Gradio would turn 16 bits of grey white on the way to RGB.
    image = gr.Image(type="filepath", image_mode=None, label="picture", height=260)
    method = gr.Dropdown(methods, value=methods[0], label="method")
    share = gr.Slider(20, 100, value=60, step=5, label="GFLOPs, % of dense")
    block = gr.Slider(0, last_block, value=last_block, step=1, label="show tokens after block")
    button = gr.Button("Run", variant="primary")
    gr.Examples([str(path) for path in example_pictures()], image)
    return [image, method, share, block], button


def _answer_with(session: Session) -> Callable[..., tuple[Any, ...]]:
    """Make what the button does; what is wrong stands in the last answer, the text."""

    def answer(image, method, share, block):
        nothing = (None,) * 5
        if image is None:
            return *nothing, "**Choose a picture first:** drop one in, or take one of the examples."
        try:
            picture = open_picture(Path(image), Path(image).name, exif=True)
            found = session.answer(picture, method, share / 100, int(block))
        except InputError as error:
            return *nothing, f"**This does not work:** {error}"
        drawn = found.groups, found.attention
        return *drawn, found.reduced, found.dense, list(found.maps), found.summary

    return answer


def example_pictures() -> list[Path]:
    """List the pictures that the page offers: photographs, and three that the demo knows."""
    clothes = [sorted(demo.images_dir().glob(f"{label}-*/*.png"))[0] for label in (0, 7, 8)]
    return [*sorted(demo.pictures_dir().glob("*.jpg")), *clothes]
