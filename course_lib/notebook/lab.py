"""The shell of a lab: controls, a picture and a sentence, in one widget that also reads as text.

A lab is declared in a chapter's `labs.py` as a list of controls and three pure functions:

    compute(**values) -> State        what happens, by the same code that the chapter uses
    draw(state)       -> Svg | Figure  the picture
    describe(state)   -> str          the picture in words: the lab's text twin

The shell makes everything else from them: a widget that works by mouse and by keyboard, follows
the theme and announces each new state; a static picture for GitHub, print and notebooks that were
not run; and a stable text for tests. An error in a lab is shown in the lab; the kernel lives on.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from course_lib.notebook.svg import Svg

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Slider:
    """One of several ordered values, chosen by a slider. `unit` follows the value on screen."""

    name: str
    label: str
    values: Sequence[float | int | str]
    start: float | int | str
    unit: str = ""

    def spec(self) -> dict[str, Any]:
        """What the front end needs to draw it."""
        return {"kind": "slider", "values": list(self.values), "unit": self.unit}

    def accepts(self, value: Any) -> bool:
        """Whether a value may be set."""
        return value in self.values


@dataclass(frozen=True)
class Choice:
    """One of a few named options."""

    name: str
    label: str
    options: Sequence[str]
    start: str

    def spec(self) -> dict[str, Any]:
        """What the front end needs to draw it."""
        return {"kind": "choice", "options": list(self.options)}

    def accepts(self, value: Any) -> bool:
        """Whether a value may be set."""
        return value in self.options


@dataclass(frozen=True)
class Toggle:
    """On or off."""

    name: str
    label: str
    start: bool = False

    def spec(self) -> dict[str, Any]:
        """What the front end needs to draw it."""
        return {"kind": "toggle"}

    def accepts(self, value: Any) -> bool:
        """Whether a value may be set."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Numbers:
    """A short row of numbers: typed, dragged into another order, or moved with the arrow keys."""

    name: str
    label: str
    start: Sequence[float]
    most: int = 12

    def spec(self) -> dict[str, Any]:
        """What the front end needs to draw it."""
        return {"kind": "numbers", "most": self.most}

    def accepts(self, value: Any) -> bool:
        """Whether a value may be set."""
        return (
            isinstance(value, list | tuple)
            and 0 < len(value) <= self.most
            and all(isinstance(x, int | float) and math.isfinite(x) for x in value)
        )


@dataclass(frozen=True)
class Steps:
    """A position in a sequence, with buttons for back, forward and play.

    The length comes from the state's attribute `steps`; positions run from 0 to `steps - 1`.
    """

    name: str
    label: str
    start: int = 0

    def spec(self) -> dict[str, Any]:
        """What the front end needs to draw it."""
        return {"kind": "steps"}

    def accepts(self, value: Any) -> bool:
        """Whether a value may be set; `compute` clamps it to the sequence."""
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0


Control = Slider | Choice | Toggle | Numbers | Steps


@dataclass(frozen=True)
class Lab:
    """An interactive lab. Calling it shows it.

    Attributes:
        name: Its name in `labs.py`.
        title: Its heading.
        task: What to find out, as one sentence that can be acted on.
        insight: The sentence that only this lab gives; shown when its button is pressed.
        controls: In the order in which they stand.
        compute: Takes every control's value by name; gives the state.
        draw: The state's picture.
        describe: The state in words; it names every number that the picture shows.
        insight_at: Values of the controls at which the insight can be seen; the browser test
            goes there.
    """

    name: str
    title: str
    task: str
    insight: str
    controls: tuple[Control, ...]
    compute: Callable[..., Any]
    draw: Callable[[Any], Svg | Figure]
    describe: Callable[[Any], str]
    insight_at: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def start(self) -> dict[str, Any]:
        """The values at which the lab opens."""
        return {control.name: control.start for control in self.controls}

    def state(self, **changes: Any) -> Any:
        """The state at the starting values with these changes.

        Raises:
            ValueError: If a control does not exist, or does not take this value.
        """
        values = dict(self.start)
        for name, value in changes.items():
            control = next((c for c in self.controls if c.name == name), None)
            if control is None:
                known = ", ".join(values)
                raise ValueError(f"{self.name} has no control {name!r}. It has: {known}.")
            if not control.accepts(value):
                raise ValueError(f"{self.name}: {control.label!r} does not take {value!r}.")
            values[name] = value
        return self.compute(**values)

    def __call__(self, **changes: Any) -> Any:
        """Show the lab, at its starting values with these changes."""
        return _view_class()(self, {**self.start, **changes})


def picture_markup(picture: Svg | Figure) -> str:
    """A picture as SVG markup. A matplotlib figure is converted and closed."""
    from course_lib.notebook.svg import Svg

    if isinstance(picture, Svg):
        return str(picture)
    import matplotlib.pyplot as plt

    buffer = io.StringIO()
    # The same picture is the same text, so that a rebuilt notebook differs only where it must.
    with plt.rc_context({"svg.hashsalt": "course"}):
        picture.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(picture)
    markup = buffer.getvalue()
    return markup[markup.index("<svg") :]


def still_html(lab: Lab, markup: str, sentence: str) -> str:
    """The lab as a static figure, for wherever no widget can run."""
    card = "background:#ffffff;color:#1f2328;padding:12px;border-radius:8px;max-width:760px"
    image = base64.b64encode(markup.encode()).decode()
    return (
        f'<figure style="{card}"><img alt="{escape(sentence, quote=True)}" '
        f'style="width:100%" src="data:image/svg+xml;base64,{image}">'
        f"<figcaption><b>{escape(lab.title)}.</b> {escape(sentence)} "
        f"<i>Run this cell to use the lab.</i></figcaption></figure>"
    )


def _view_class() -> type:
    """The widget class; made on first use, so that importing a lab loads no widget library."""
    global _VIEW
    if _VIEW is None:
        _VIEW = _make_view_class()
    return _VIEW


_VIEW: type | None = None


def _make_view_class() -> type:
    import anywidget
    import traitlets

    class LabView(anywidget.AnyWidget):
        """A lab on a page. `values` moves the controls; `sentence` is the text twin."""

        _esm = HERE / "lab.js"
        _css = HERE / "lab.css"
        spec = traitlets.Dict().tag(sync=True)
        values = traitlets.Dict().tag(sync=True)
        picture = traitlets.Unicode().tag(sync=True)
        sentence = traitlets.Unicode().tag(sync=True)
        steps = traitlets.Int(1).tag(sync=True)
        error = traitlets.Unicode().tag(sync=True)
        done = traitlets.Int(0).tag(sync=True)

        def __init__(self, lab: Lab, values: dict[str, Any]) -> None:
            self.lab = lab
            controls = [{"name": c.name, "label": c.label, **c.spec()} for c in lab.controls]
            spec = {
                "name": lab.name,
                "title": lab.title,
                "task": lab.task,
                "insight": lab.insight,
                "controls": controls,
            }
            super().__init__(spec=spec, values=values)
            self._update()
            self.observe(self._update, names="values")

        def _update(self, _change: object = None) -> None:
            with self.hold_sync():
                try:
                    state = self.lab.state(**self.values)
                    sentence = self.lab.describe(state)
                    picture = picture_markup(self.lab.draw(state))
                except Exception as error:
                    self.error = f"{type(error).__name__}: {error}"
                else:
                    self.steps = getattr(state, "steps", 1)
                    self.sentence, self.picture, self.error = sentence, picture, ""
                self.done += 1

        def _repr_mimebundle_(self, **kwargs: Any) -> Any:
            bundle = super()._repr_mimebundle_(**kwargs)
            data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
            data["text/plain"] = f"{self.lab.title}. {self.error or self.sentence}"
            data["text/html"] = still_html(self.lab, self.picture, self.error or self.sentence)
            return data, metadata

    return LabView
