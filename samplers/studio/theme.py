"""The page's colours and its style sheet: dark, so that clips are what shines."""

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from samplers.studio.draw import COLOURS
from samplers.studio.fields import Field

INK, PANEL, RAISED, LINE = "#0d0f14", "#151821", "#1d212d", "#2a3040"
TEXT, QUIET, ACCENT, SECOND = "#eceef4", "#98a0b3", "#8f7bff", "#3ddbb4"


def theme() -> gr.themes.Base:
    """The same in light and dark mode; fonts are the system's, nothing is fetched."""
    fonts = ["Inter", "ui-sans-serif", "system-ui", "Segoe UI", "sans-serif"]
    base = gr.themes.Base(
        primary_hue="violet",font=fonts, font_mono=["ui-monospace", "Menlo", "monospace"], radius_size="lg",
                          spacing_size="md", text_size="md")  # fmt: skip
    colours = {
        "body_background_fill": INK, "body_text_color": TEXT, "body_text_color_subdued": QUIET,
        "background_fill_primary": PANEL, "background_fill_secondary": INK, "block_background_fill": PANEL,
        "block_border_color": LINE, "block_label_background_fill": "transparent", "block_label_text_color": QUIET,
        "block_title_text_color": QUIET, "block_info_text_color": QUIET, "border_color_primary": LINE,
        "border_color_accent": ACCENT, "color_accent_soft": RAISED, "input_background_fill": RAISED,
        "input_border_color": LINE, "input_border_color_focus": ACCENT, "input_placeholder_color": "#5d6579",
        "slider_color": ACCENT, "checkbox_background_color": RAISED, "checkbox_background_color_selected": ACCENT,
        "checkbox_border_color": LINE, "checkbox_border_color_selected": ACCENT,
        "checkbox_label_background_fill": RAISED,
        "checkbox_label_background_fill_hover": LINE, "checkbox_label_background_fill_selected": "#2b2650",
        "checkbox_label_text_color": TEXT, "checkbox_label_text_color_selected": TEXT,
        "button_primary_background_fill": ACCENT, "button_primary_background_fill_hover": "#a394ff",
        "button_primary_text_color": "#0d0f14", "button_primary_border_color": ACCENT,
        "button_secondary_background_fill": RAISED, "button_secondary_background_fill_hover": LINE,
        "button_secondary_text_color": TEXT, "button_secondary_border_color": LINE,
        "button_cancel_background_fill": "transparent", "button_cancel_text_color": QUIET,
        "panel_background_fill": PANEL, "panel_border_color": LINE, "link_text_color": SECOND, "loader_color": ACCENT,
        "error_background_fill": RAISED, "error_text_color": "#ff9b8a", "error_border_color": "#5a2f2f",
    }  # fmt: skip
    known = base.set.__kwdefaults__ or {}
    both = colours | {f"{name}_dark": value for name, value in colours.items() if f"{name}_dark" in known}
    return base.set(block_shadow="none", block_border_width="1px", block_label_border_width="0px", **both)


def css(fields: Sequence[Field]) -> str:
    """The style sheet: page.css, the paper's values as marks on the sliders, and the colours of the swatches."""
    sheet = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    names = {"ink": INK, "panel": PANEL, "raised": RAISED, "line": LINE, "text": TEXT, "quiet": QUIET, "accent": ACCENT,
             "second": SECOND}  # fmt: skip
    root = ":root{" + "".join(f"--wj-{name}:{value};" for name, value in names.items()) + "}"
    marks = [
        f"#{one.name}{{--wj-paper:{one.share:.4f};--wj-value:'{one.paper:g}'}}" for one in fields if not one.choices
    ]
    swatches = [f"#{kind} label:nth-child({i}){{--wj-swatch:rgb{rgb}}}"
                for kind in ("colour", "ground") for i, rgb in enumerate(COLOURS.values(), 1)]  # fmt: skip
    return "\n".join([root, sheet, *marks, *swatches])


def head() -> str:
    """What goes into the page's head."""
    script = (Path(__file__).parent / "page.js").read_text(encoding="utf-8")
    return f'<meta name="color-scheme" content="dark"><script>{script}</script>'
